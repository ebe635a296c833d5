// Decodes slabs of codec `exp` (docs/format.md) from GPU memory into an engine's pages.
//
// A slab comes as it is stored: encoded, or raw where that was not longer. One warp takes one tile of it
// at a time, and all of it is read before the first byte is written; other warps sum the stored bytes,
// piece by piece. Whatever the bytes say, nothing is read but the slab's stored bytes and nothing is
// written but its own places in the pages: a slab that is not well formed counts as one with another sum.

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

// Writes the vector of a lane in each quarter to the pages.
template <u32 WIDTH>
__device__ __forceinline__ void write_tile(const Job &job, u32 token, const Tile &tile, u32 lane,
                                           const uint4 (&vectors)[QUARTERS]) {
    const u64 run = WIDTH == VECTOR ? run_of_tile(job, token, tile, lane) : 0;
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u32 at = (quarter * tile.groups + lane) * VECTOR;
        if (WIDTH == VECTOR && run) {
            __stcs(reinterpret_cast<uint4 *>(run + at), vectors[quarter]);
        } else if (lane < tile.groups) {
            scatter<WIDTH>(job, token, tile.start + at, tile.end, vectors[quarter]);
        }
    }
}

template <u32 WIDTH>
__device__ __forceinline__ void move_raw(const Job &job, u32 token, const Tile &tile, u32 lane, u64 slab) {
    uint4 vectors[QUARTERS];
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u32 offset = tile.start + (quarter * tile.groups + lane) * VECTOR;
        vectors[quarter] = make_uint4(0, 0, 0, 0);
        if (lane >= tile.groups) {
            continue;
        }
        if constexpr (WIDTH == VECTOR) {
            if (offset < tile.end) {
                vectors[quarter] = __ldcs(reinterpret_cast<const uint4 *>(slab + offset));
            }
        } else {
            vectors[quarter] = read_one_by_one(slab, offset, tile.end);
        }
    }
    write_tile<WIDTH>(job, token, tile, lane, vectors);
}

// Is every byte of a slab's header that has to be zero? Whole warps.
__device__ __forceinline__ bool is_clean(const Coded &coded, u32 lane, u64 slab, u32 bits) {
    const u32 value = reinterpret_cast<const u32 *>(slab)[lane];
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

// What a lane takes of an encoded tile: its mantissas and, of each quarter, its code word.
struct Lines {
    uint2 mantissas[QUARTERS];
    u32 words[QUARTERS];
};

// Decodes the tile; false where its codes want another number of escapes than `count`. `escapes` is the
// warp's own shared memory and holds the tile's.
template <u32 WIDTH, u32 BITS>
__device__ __forceinline__ bool decode_tile(const Job &job, u32 token, const Tile &tile, u32 lane, const uint4 &book,
                                            Lines &lines, const u8 *escapes, u32 count) {
    const u32 n = tile.groups;
    u32(&words)[QUARTERS] = lines.words;
    if constexpr (BITS == 3) {
        words[3] = fourth_word(words);
    }
    u32 first[QUARTERS];
    const bool right = rank_escapes<BITS>(words, lane, n, count, first);
    const uint2 low = make_uint2(book.x, book.y), high = make_uint2(book.z, book.w);
    uint4 vectors[QUARTERS];
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        uint2 exponents = look_up<BITS>(words[quarter], low, high);
        u32 next = first[quarter];
        for (u32 left = lane < n ? escapes_in<BITS>(words[quarter]) : 0; left; left &= left - 1) {
            const u32 value = (__ffs(left) - 1) / 4;
            const u32 escape = next < count ? escapes[next] : 0;
            next++;
            const u32 shift = value % 4 * 8;
            u32 &half = value < 4 ? exponents.x : exponents.y;
            half = (half & ~(0xffu << shift)) | escape << shift;
        }
        const uint2 bytes = lines.mantissas[quarter];
        vectors[quarter] = make_uint4(join(bytes.x, exponents.x, 0x4140), join(bytes.x, exponents.x, 0x4342),
                                      join(bytes.y, exponents.y, 0x4140), join(bytes.y, exponents.y, 0x4342));
    }
    write_tile<WIDTH>(job, token, tile, lane, vectors);
    return right;
}

// One tile of an encoded slab; false where it is not well formed. The same in every lane. Whatever can be
// asked for already is, before what was asked for is looked at.
template <u32 WIDTH>
__device__ __forceinline__ bool move_tile(const Coded &coded, u32 token, u32 number, u32 lane, u64 slab, u32 stored,
                                          u8 *escapes) {
    const Tile tile = tile_of(coded.plane, coded.job.planes, number);
    if (stored == coded.job.slab_bytes) {
        move_raw<WIDTH>(coded.job, token, tile, lane, slab);
        return true;
    }
    const u32 codes_at = HEADER_BYTES + GROUP_VALUES * coded.groups;
    if (stored < codes_at || stored > coded.job.slab_bytes) {
        return false;
    }
    const uint2 head = *reinterpret_cast<const uint2 *>(slab);
    const uint4 book = *reinterpret_cast<const uint4 *>(slab + 16 + 16 * tile.plane);
    const u64 mantissas = slab + HEADER_BYTES + GROUP_VALUES * (coded.plane[tile.plane].first_group + tile.group_in_plane);
    Lines lines;
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u64 at = mantissas + 8 * (quarter * tile.groups + lane);
        lines.mantissas[quarter] =
            lane < tile.groups ? __ldcs(reinterpret_cast<const uint2 *>(at)) : make_uint2(0, 0);
    }
    u32 all = 0, codes = 0, bits = 0;
    bool right = true;
#pragma unroll
    for (u32 plane = 0; plane < PLANES_MAX; plane++) {
        if (plane < coded.job.planes) {
            const u32 of_plane = head.y >> (8 * plane) & 0xff;
            right &= of_plane == 3 || of_plane == 4;
            codes = plane == tile.plane ? all : codes;
            bits = plane == tile.plane ? of_plane : bits;
            all += 4 * of_plane * coded.plane[plane].groups;
        }
    }
    const u32 offsets_at = codes_at + all, escapes_at = offsets_at + 4 * coded.tiles;
    right &= head.x <= stored && escapes_at <= stored && escapes_at + head.x == stored;
    if (!right || (number == 0 && !is_clean(coded, lane, slab, head.y))) {
        return false;
    }
    const u32 *offsets = reinterpret_cast<const u32 *>(slab + offsets_at) + number;
    const u32 start = offsets[0], end = number + 1 < coded.tiles ? offsets[1] : head.x;
    const u64 words = slab + codes_at + codes + 4 * bits * tile.group_in_plane;
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u64 at = words + 4 * (quarter * tile.groups + lane);
        lines.words[quarter] =
            lane < tile.groups && quarter < bits ? __ldcs(reinterpret_cast<const u32 *>(at)) : 0;
    }
    const u32 count = end - start;
    if (start > end || end > head.x || count > GROUP_VALUES * tile.groups || (number == 0 && start != 0)) {
        return false;
    }
    // The warp's last tile was decoded before.
    __syncwarp();
    for (u32 at = lane; at < count; at += WARP) {
        escapes[at] = *reinterpret_cast<const u8 *>(slab + escapes_at + start + at);
    }
    __syncwarp();
    return bits == 3 ? decode_tile<WIDTH, 3>(coded.job, token, tile, lane, book, lines, escapes, count)
                     : decode_tile<WIDTH, 4>(coded.job, token, tile, lane, book, lines, escapes, count);
}

template <u32 WIDTH> __device__ __forceinline__ void decode_slabs(const Coded &coded) {
    __shared__ u8 escapes[BLOCK_WARPS][TILE_VALUES];
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
                               u64(in_row) + stored.bytes <= job.slab_step && stored.bytes != 0;
        const u64 slab = job.slab_base + index * job.slab_step + in_row;
        u64 sum = 0;
        if (!is_in_row) {
            sum = 1;
        } else if (part < coded.tiles) {
            sum = move_tile<WIDTH>(coded, move.token, part, lane, slab, stored.bytes, escapes[warp]) ? 0 : 1;
        } else if ((part - coded.tiles) * PIECE < stored.bytes) {
            sum = sum_piece(slab, part - coded.tiles, stored.bytes, lane);
        }
        if (sum && lane == 0) {
            atomicAdd(job.sums + u64(job.first_layer + blockIdx.y) * job.all_moves + job.first_move + index, sum);
        }
    }
}

#define DECODE(WIDTH)                                                                                        \
    extern "C" __global__ void __launch_bounds__(512) decode_##WIDTH(const __grid_constant__ Coded coded) { \
        decode_slabs<WIDTH>(coded);                                                                          \
    }

DECODE(16)
DECODE(4)
DECODE(2)
DECODE(1)
