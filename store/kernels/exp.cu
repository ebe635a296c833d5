// Decodes slabs of codec `exp` (docs/format.md) from GPU memory into an engine's pages.
//
// A slab comes as it is stored: encoded, or raw where that was not longer. Whatever the bytes say, nothing is
// read but the slab's stored bytes and nothing is written but its own places in the pages: a slab that is
// not well formed counts as one with another sum.
//
// `decode`, one block a slab, reads the stored bytes once, into shared memory; they are summed and decoded
// there. It has little code on purpose: each slice's kernel comes a while after the one before, with the
// engine's between, and fetches its code anew.
//
// `decode_large`, for slabs that are too large for that, and `decode_narrow`, for pages that do not allow the
// widest vectors: one warp takes one tile at a time where it lies; other warps sum the stored bytes, piece by
// piece.

#include "exp.cuh"

struct Coded {
    // `slab_step` goes from the first stored byte of `first_layer` to that of the next move.
    Job job;
    // [layer][move], as the slots say: not to be trusted.
    const Stored *stored;
    CodedPlane plane[PLANES_MAX];
    // Of a slab, all planes.
    u32 tiles;
    u32 groups;
    // Pieces of a raw slab, or 0 where nobody wants sums: then it is added up only whether slabs are well formed.
    u32 pieces;
    u32 unused;
};

// Is every byte of a slab's header that has to be zero? Each lane has its word. Whole warps.
__device__ __forceinline__ bool is_clean(const Coded &coded, u32 lane, u32 value, u32 bits) {
    u32 used = 0;
    if (lane == 0) {
        used = ~0u;
    } else if (lane == 1) {
        used = coded.job.planes >= PLANES_MAX ? ~0u : (1u << (8 * coded.job.planes)) - 1;
    } else if (lane >= 4 && lane < 4 + 4 * coded.job.planes) {
        const u32 codes = (1u << (bits >> ((lane - 4) / 4 * 8) & 0xff)) - 1;
        const int left = int(codes) - int((lane - 4) % 4 * 4);
        used = left >= 4 ? ~0u : left <= 0 ? 0 : (1u << (8 * left)) - 1;
    }
    return __all_sync(~0u, (value & ~used) == 0);
}

// Eight exponents by their codes. `low` has those of codes 0 to 7, `high` the others.
template <u32 BITS> __device__ __forceinline__ uint2 look_up(u32 codes, const uint2 &low, const uint2 &high) {
    const u32 select = codes & 0x77777777u;
    uint2 found = make_uint2(__byte_perm(low.x, low.y, select), __byte_perm(low.x, low.y, select >> 16));
    if constexpr (BITS == 4) {
        // All bits of the bytes whose code is 8 or more.
        const u32 is_high = codes >> 3 & 0x11111111u;
        const u32 first = __byte_perm(0x0000ff00u, 0, is_high), last = __byte_perm(0x0000ff00u, 0, is_high >> 16);
        const uint2 other = make_uint2(__byte_perm(high.x, high.y, select), __byte_perm(high.x, high.y, select >> 16));
        found.x = (found.x & ~first) | (other.x & first);
        found.y = (found.y & ~last) | (other.y & last);
    }
    return found;
}

// Two values from two mantissa bytes and two exponents, of the lower or the upper half of each.
__device__ __forceinline__ u32 join(u32 mantissas, u32 exponents, u32 select) {
    const u32 m = __byte_perm(mantissas, 0, select), e = __byte_perm(exponents, 0, select);
    return (m & 0x00800080u) << 8 | e << 7 | (m & 0x007f007fu);
}

// A slab as it is stored, in shared memory or the GPU's, and what its header says.
struct Slab {
    const uint4 *body;
    u32 stored;
    bool is_raw;
    u32 escapes;
    // The areas of codes, offsets and escapes.
    u32 codes_at;
    u32 offsets_at;
    u32 escapes_at;

    __device__ __forceinline__ const u8 *bytes() const { return reinterpret_cast<const u8 *>(body); }
    __device__ __forceinline__ const u32 *words() const { return reinterpret_cast<const u32 *>(body); }
    __device__ __forceinline__ u32 bits_of(u32 plane) const { return bytes()[4 + plane]; }

    // Is it well formed, but for what its tiles say? Whole warps.
    __device__ __forceinline__ bool read_header(const Coded &coded, u32 lane) {
        is_raw = stored == coded.job.slab_bytes;
        escapes = 0;
        codes_at = offsets_at = HEADER_BYTES + GROUP_VALUES * coded.groups;
        escapes_at = offsets_at;
        if (is_raw || stored < codes_at) {
            return is_raw;
        }
        bool right = is_clean(coded, lane, words()[lane], words()[1]);
#pragma unroll 1
        for (u32 plane = 0; plane < coded.job.planes; plane++) {
            const u32 bits = bits_of(plane);
            right &= bits == 3 || bits == 4;
            offsets_at += 4 * bits * coded.plane[plane].groups;
        }
        escapes = words()[0];
        escapes_at = offsets_at + 4 * coded.tiles;
        return right && escapes <= stored && escapes_at <= stored && escapes_at + escapes == stored;
    }
};

// Brings one tile into the pages; false where it is not well formed. The same in every lane.
template <u32 WIDTH>
__device__ __forceinline__ bool move_tile(const Coded &coded, u32 token, u32 number, u32 lane, const Slab &slab) {
    const Job &job = coded.job;
    const Tile tile = tile_of(coded.plane, job.planes, number);
    const bool is_there = lane < tile.groups;
    u32 bits = 0, count = 0, mantissas_at = 0;
    u32 words[QUARTERS] = {0, 0, 0, 0};
    const u8 *escapes = slab.bytes() + slab.escapes_at;
    if (!slab.is_raw) {
        const u32 *offsets = slab.words() + slab.offsets_at / 4 + number;
        const u32 start = offsets[0], end = number + 1 < coded.tiles ? offsets[1] : slab.escapes;
        count = end - start;
        if (start > end || end > slab.escapes || count > GROUP_VALUES * tile.groups || (number == 0 && start != 0)) {
            return false;
        }
        escapes += start;
        bits = slab.bits_of(tile.plane);
        u32 codes_at = slab.codes_at + 4 * bits * tile.group_in_plane;
#pragma unroll 1
        for (u32 plane = 0; plane < tile.plane; plane++) {
            codes_at += 4 * slab.bits_of(plane) * coded.plane[plane].groups;
        }
        mantissas_at = HEADER_BYTES + GROUP_VALUES * (coded.plane[tile.plane].first_group + tile.group_in_plane);
#pragma unroll
        for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
            const u32 at = codes_at / 4 + quarter * tile.groups + lane;
            words[quarter] = is_there && quarter < bits ? slab.words()[at] : 0;
        }
        words[3] = bits == 3 ? fourth_word(words) : words[3];
    }
    const u32 own = bits == 3 ? count_escapes<3>(words) : count_escapes<4>(words);
    const Ranks ranks(is_there && !slab.is_raw ? own : 0, lane);
    const uint4 book = slab.is_raw ? make_uint4(0, 0, 0, 0) : slab.body[1 + tile.plane];
    const uint2 low = make_uint2(book.x, book.y), high = make_uint2(book.z, book.w);
    const u64 run = WIDTH == VECTOR ? run_of_tile(job, token, tile, lane) : 0;
    u32 first = 0;
#pragma unroll 1
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u32 at = quarter * tile.groups + lane, offset = tile.start + at * VECTOR;
        uint4 vector = make_uint4(0, 0, 0, 0);
        if (slab.is_raw) {
            if (is_there && offset < tile.end) {
                vector = WIDTH == VECTOR ? slab.body[offset / VECTOR]
                                         : read_one_by_one(u64(slab.body), offset, tile.end);
            }
        } else {
            const u32 word = quarter < 2 ? (quarter ? words[1] : words[0]) : (quarter == 2 ? words[2] : words[3]);
            const uint2 mantissas =
                is_there ? *reinterpret_cast<const uint2 *>(slab.bytes() + mantissas_at + 8 * at) : make_uint2(0, 0);
            uint2 exponents = bits == 3 ? look_up<3>(word, low, high) : look_up<4>(word, low, high);
            u32 next = first + ranks.before_lane(quarter);
            first += ranks.of_quarter(quarter);
#pragma unroll 1
            for (u32 left = is_there ? escapes_of(bits, word) : 0; left; left &= left - 1) {
                const u32 value = (__ffs(left) - 1) / 4;
                const u32 escape = next < count ? escapes[next] : 0;
                next++;
                const u32 shift = value % 4 * 8, byte = 0xffu << shift;
                const u32 in_low = value < 4 ? byte : 0, in_high = value < 4 ? 0 : byte;
                exponents.x = (exponents.x & ~in_low) | (escape << shift & in_low);
                exponents.y = (exponents.y & ~in_high) | (escape << shift & in_high);
            }
            vector = make_uint4(join(mantissas.x, exponents.x, 0x4140), join(mantissas.x, exponents.x, 0x4342),
                                join(mantissas.y, exponents.y, 0x4140), join(mantissas.y, exponents.y, 0x4342));
        }
        if (run) {
            __stcs(reinterpret_cast<uint4 *>(run + at * VECTOR), vector);
        } else if (is_there) {
            scatter<WIDTH>(job, token, offset, tile.end, vector);
        }
    }
    return first == count;
}

// The sum of a piece of what is stored, in every lane.
__device__ __forceinline__ u64 sum_shared_piece(const Slab &slab, u32 piece, u32 lane) {
    Sum sum = {0, 0};
#pragma unroll 1
    for (u32 turn = 0; turn < TURNS; turn++) {
        const u32 at = turn * WARP + lane, offset = piece * PIECE + at * VECTOR;
        uint4 vector = make_uint4(0, 0, 0, 0);
        if (offset < slab.stored) {
            const uint4 own = slab.body[offset / VECTOR];
            const int left = int(slab.stored - offset);
            vector = make_uint4(cut(own.x, left), cut(own.y, left - 4), cut(own.z, left - 8), cut(own.w, left - 12));
        }
        sum.add(word(vector.x, vector.y), KEYS.of[2 * at]);
        sum.add(word(vector.z, vector.w), KEYS.of[2 * at + 1]);
    }
    return sum.of_warp(piece);
}

// Of slabs that fit into a block's shared memory, whose pages allow the widest vectors.
extern "C" __global__ void __launch_bounds__(512, 2) decode(const __grid_constant__ Coded coded) {
    extern __shared__ uint4 body[];
    const Job &job = coded.job;
    const u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, warps = blockDim.x / WARP;
    const u32 number = job.first_move + blockIdx.x;
    const u64 row = u64(job.first_layer + blockIdx.y) * job.all_moves + number;
    const Move move = job.moves[number];
    const Stored stored = coded.stored[row];
    const u32 first_offset = coded.stored[u64(job.first_layer) * job.all_moves + number].offset;
    if (!move.moved) {
        return;
    }
    const u32 in_row = stored.offset - first_offset;
    bool right = stored.offset >= first_offset && stored.offset % ALIGN == 0 && first_offset % ALIGN == 0 &&
                 u64(in_row) + stored.bytes <= job.slab_step && stored.bytes != 0 && stored.bytes <= job.slab_bytes;
    Slab slab = {body, right ? stored.bytes : 0};
    const u64 from = job.slab_base + blockIdx.x * job.slab_step + in_row;
    const u32 to = u32(__cvta_generic_to_shared(body));
    // What was read once is not wanted again: it makes room in the cache for what the link brings.
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    for (u32 offset = thread * VECTOR; offset < slab.stored; offset += blockDim.x * VECTOR) {
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to + offset),
                     "l"(from + offset), "l"(policy));
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    right = right && slab.read_header(coded, lane);
    u64 sum = 0;
    if (!right) {
        sum = warp == 0;
    } else {
#pragma unroll 1
        for (u32 tile = warp; tile < coded.tiles; tile += warps) {
            sum += move_tile<VECTOR>(coded, move.token, tile, lane, slab) ? 0 : 1;
        }
        // Where nobody wants sums there are no pieces. From the other end: those warps have fewer tiles.
#pragma unroll 1
        for (u32 piece = warps - 1 - warp; piece < coded.pieces && piece * PIECE < slab.stored; piece += warps) {
            sum += sum_shared_piece(slab, piece, lane);
        }
    }
    if (sum && lane == 0) {
        atomicAdd(job.sums + row, sum);
    }
}

template <u32 WIDTH> __device__ __forceinline__ void decode_slabs(const Coded &coded) {
    const Job &job = coded.job;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 warps = gridDim.x * (blockDim.x / WARP);
    const u32 parts = coded.tiles + coded.pieces;
    const u32 tasks = job.count * parts;
    const Stored *first_row = coded.stored + u64(job.first_layer) * job.all_moves;
    const Stored *row = first_row + u64(blockIdx.y) * job.all_moves;
    for (u32 task = blockIdx.x * (blockDim.x / WARP) + warp; task < tasks; task += warps) {
        const u32 index = task / parts;
        const u32 part = task - index * parts;
        const Move move = job.moves[job.first_move + index];
        const Stored stored = row[job.first_move + index];
        const u32 first_offset = first_row[job.first_move + index].offset;
        if (!move.moved) {
            continue;
        }
        const u32 in_row = stored.offset - first_offset;
        const bool is_in_row = stored.offset >= first_offset && stored.offset % ALIGN == 0 && first_offset % ALIGN == 0 &&
                               u64(in_row) + stored.bytes <= job.slab_step && stored.bytes != 0 &&
                               stored.bytes <= job.slab_bytes;
        const u64 from = job.slab_base + index * job.slab_step + in_row;
        u64 sum = 0;
        if (!is_in_row) {
            sum = 1;
        } else if (part < coded.tiles) {
            Slab slab = {reinterpret_cast<const uint4 *>(from), stored.bytes};
            const bool right = slab.read_header(coded, lane);
            sum = right && move_tile<WIDTH>(coded, move.token, part, lane, slab) ? 0 : 1;
        } else if ((part - coded.tiles) * PIECE < stored.bytes) {
            sum = sum_piece(from, part - coded.tiles, stored.bytes, lane);
        }
        if (sum && lane == 0) {
            atomicAdd(job.sums + u64(job.first_layer + blockIdx.y) * job.all_moves + job.first_move + index, sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(512) decode_large(const __grid_constant__ Coded coded) {
    decode_slabs<VECTOR>(coded);
}

extern "C" __global__ void __launch_bounds__(512) decode_narrow(const __grid_constant__ Coded coded) {
    decode_slabs<NARROW>(coded);
}
