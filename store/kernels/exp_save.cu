// Encodes an engine's pages with codec `exp` (docs/format.md): what is stored of a slab comes to staging memory.
//
// `encode`, one block a slab: what the slab's values are is read once, into registers. Their exponents are
// counted, coded, and the stored bytes put together in shared memory, summed there, and written. The slabs of
// a slot come one behind the other, each layer's behind the longest of the layer before: a block waits until
// the lengths of the layers before its own are known. Its grid goes layer by layer, and blocks begin in the
// order of their numbers, so whom it waits for has begun; should that ever not be so, it gives up.
//
// `encode_large`, for slabs that are too large for that, reads the pages twice and writes each slab where the
// layer's raw slab would be. Every encoder writes the same bytes.

#include "exp.cuh"

constexpr u32 EXPONENTS = 256;
constexpr u32 BOOK = 15;
// Tiles that a warp has in registers.
constexpr u32 WARP_TILES = 2;
constexpr u32 TILES_MAX = WARP_TILES * BLOCK_WARPS;
// Of planes with so many values, one value of each vector counts, in place of all eight.
constexpr u32 SAMPLED_VALUES = 8192;
constexpr u32 SAMPLE = 8;
// Which one: the top bits of the vector's number times this.
constexpr u32 SCATTER = 0xcc9e2d51;
// How often a block looks whether the layers before its own are done: some seconds.
constexpr u32 LOOKS_MAX = 1 << 24;

struct Encode {
    // Where the slabs are in the engine's pages.
    Job job;
    // The first move's row, from one move's row to the next, and from one layer's slab to the next where
    // slabs are large.
    u64 rows;
    u64 move_step;
    u64 layer_step;
    // By layer: `epoch` in the high half, bytes from its start to the next layer's in the low one.
    u64 *widths;
    // By layer: the longest slab, and how many are known; zero between slices.
    u32 *longest;
    u32 *known;
    // [layer][move], in pinned host memory: the sum of the slab's pieces, where it starts in its row, and its
    // bytes: none where the block gave up. Mirrored in src/device/cuda/exp_save.rs.
    uint4 *answers;
    CodedPlane plane[PLANES_MAX];
    u32 tiles;
    u32 groups;
    // Another for each slice.
    u32 epoch;
    u32 unused;
};

__device__ __forceinline__ u32 exponent_of(u32 value) { return value >> 7 & 0xff; }

// Value `k` of eight.
__device__ __forceinline__ u32 value_of(const uint4 &values, u32 k) {
    const u32 pair = k < 4 ? (k < 2 ? values.x : values.y) : (k < 6 ? values.z : values.w);
    return k % 2 ? pair >> 16 : pair & 0xffff;
}

// Values of a lane's vector that are there.
__device__ __forceinline__ u32 values_in(const Tile &tile, u32 at) {
    const u32 offset = tile.start + at * VECTOR;
    return offset < tile.end ? min((tile.end - offset) / 2, VECTOR / 2) : 0;
}

// Reads the vectors of a tile out of the pages. Whole warps.
template <u32 WIDTH>
__device__ __forceinline__ void read_tile(const Encode &coder, const Move &move, const Tile &tile, u32 lane,
                                          uint4 (&vectors)[QUARTERS]) {
    const u64 run = WIDTH == VECTOR && move.moved ? run_of_tile(coder.job, move.token, tile, lane) : 0;
    if (WIDTH == VECTOR && run) {
#pragma unroll
        for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
            const u32 at = quarter * tile.groups + lane;
            vectors[quarter] = __ldcs(reinterpret_cast<const uint4 *>(run + at * VECTOR));
        }
        return;
    }
    // Much code, so it is there once.
#pragma unroll 1
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const bool is_there = lane < tile.groups && move.moved;
        const u32 offset = is_there ? tile.start + (quarter * tile.groups + lane) * VECTOR : tile.end;
        const uint4 vector = gather<WIDTH>(coder.job, move.token, offset, tile.end);
#pragma unroll
        for (u32 each = 0; each < QUARTERS; each++) {
            vectors[each] = each == quarter ? vector : vectors[each];
        }
    }
}

// Counts a tile's exponents, or of a large plane a sample of them.
__device__ __forceinline__ void count_tile(const Tile &tile, u32 plane_start, u32 lane,
                                           const uint4 (&vectors)[QUARTERS], u32 *counts) {
    const bool is_sampled = (tile.end - plane_start) / 2 >= SAMPLED_VALUES;
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u32 at = quarter * tile.groups + lane;
        const u32 left = lane < tile.groups ? values_in(tile, at) : 0;
        if (is_sampled) {
            const u32 vector = tile.group_in_plane * QUARTERS + at;
            const u32 k = vector * SCATTER >> 29;
            if (k < left) {
                atomicAdd(&counts[exponent_of(value_of(vectors[quarter], k))], 1u);
            }
        } else {
#pragma unroll
            for (u32 k = 0; k < VECTOR / 2; k++) {
                if (k < left) {
                    atomicAdd(&counts[exponent_of(value_of(vectors[quarter], k))], 1u);
                }
            }
        }
    }
}

// Chooses the codes of a plane by its counts, which are used up; the exponents go to `book`, each exponent's
// code to `code_of`. Its bits. Whole warps.
__device__ __forceinline__ u32 choose(const CodedPlane &plane, u32 lane, u32 *counts, u8 *book, u32 *code_of) {
    constexpr u32 EACH = EXPONENTS / WARP;
    const u32 below = (1u << lane) - 1;
    u32 own[EACH], all = 0, used = 0, first_free = 0;
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
        own[k] = counts[k * WARP + lane];
        all += own[k];
    }
    all = __reduce_add_sync(~0u, all);
    __syncwarp();
    // Those that are there, one behind the other: the greater comes first.
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
        const u32 there = __ballot_sync(~0u, own[k] != 0);
        if (own[k]) {
            counts[used + __popc(there & below)] = own[k] << 8 | (EXPONENTS - 1 - (k * WARP + lane));
        }
        used += __popc(there);
        first_free = k == 0 ? ~there : first_free;
    }
    if (lane < 16) {
        book[lane] = 0;
    }
    __syncwarp();
    u32 seven = 0, fifteen = 0;
    for (u32 start = 0; start < used; start += WARP) {
        const u32 key = start + lane < used ? counts[start + lane] : 0;
        u32 rank = 0;
        for (u32 other = 0; other < used; other++) {
            rank += counts[other] > key;
        }
        if (key && rank < BOOK) {
            book[rank] = u8(EXPONENTS - 1 - key % EXPONENTS);
            seven += rank < 7 ? key >> 8 : 0;
            fifteen += key >> 8;
        }
    }
    // The lowest of those that are not there come behind them; that many are below 32.
    const u32 rank = used + __popc(first_free & below);
    if ((first_free >> lane & 1) && rank < BOOK) {
        book[rank] = u8(lane);
    }
    const bool is_sampled = (plane.end - plane.start) / 2 >= SAMPLED_VALUES;
    const u32 each = is_sampled ? SAMPLE : 1;
    const u32 beyond_three = (all - __reduce_add_sync(~0u, seven)) * each;
    const u32 beyond_four = (all - __reduce_add_sync(~0u, fifteen)) * each;
    const u32 bits = 12 * plane.groups + beyond_three <= 16 * plane.groups + beyond_four ? 3 : 4;
    const u32 escape = (1u << bits) - 1;
    for (u32 at = lane; at < EXPONENTS / 4; at += WARP) {
        code_of[at] = escape * 0x01010101u;
    }
    __syncwarp();
    if (lane < escape) {
        reinterpret_cast<u8 *>(code_of)[book[lane]] = u8(lane);
    } else if (lane < 16) {
        book[lane] = 0;
    }
    return bits;
}

// The codes of four values, the lowest first, four bits each.
__device__ __forceinline__ u32 codes_of(const u8 *code_of, u32 first, u32 second) {
    const u32 a = first << 1, b = second << 1;
    return code_of[a >> 8 & 0xff] | code_of[a >> 24] << 4 | code_of[b >> 8 & 0xff] << 8 | code_of[b >> 24] << 12;
}

// Sign and mantissa of four values.
__device__ __forceinline__ u32 mantissas_of(u32 first, u32 second) {
    const u32 a = (first & 0x007f007f) | (first >> 8 & 0x00800080);
    const u32 b = (second & 0x007f007f) | (second >> 8 & 0x00800080);
    return __byte_perm(a, b, 0x6420);
}

// The code words of a tile, as if codes had four bits; zero behind the end of the plane. How many escapes
// there are, in every lane. Whole warps.
__device__ __forceinline__ u32 code_tile(const Tile &tile, u32 lane, u32 bits, const u8 *code_of,
                                         const uint4 (&vectors)[QUARTERS], u32 (&words)[QUARTERS]) {
    u32 count = 0;
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const uint4 &values = vectors[quarter];
        const u32 left = lane < tile.groups ? values_in(tile, quarter * tile.groups + lane) : 0;
        const u32 codes = codes_of(code_of, values.x, values.y) | codes_of(code_of, values.z, values.w) << 16;
        words[quarter] = left >= VECTOR / 2 ? codes : codes & ((1u << (4 * left)) - 1);
        count += __popc(escapes_of(bits, words[quarter]));
    }
    return __reduce_add_sync(~0u, count);
}

// Writes a tile whose first escape goes to `escapes`. Whole warps.
template <u32 BITS>
__device__ __forceinline__ void write_coded(const Tile &tile, u32 lane, const uint4 (&vectors)[QUARTERS],
                                            const u32 (&words)[QUARTERS], uint2 *mantissas, u32 *codes, u8 *escapes) {
    const Ranks ranks(lane < tile.groups ? count_escapes<BITS>(words) : 0, lane);
    u32 first = 0;
    if (lane >= tile.groups) {
        return;
    }
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u32 at = quarter * tile.groups + lane;
        const uint4 &values = vectors[quarter];
        mantissas[at] = make_uint2(mantissas_of(values.x, values.y), mantissas_of(values.z, values.w));
        if (quarter < BITS) {
            const u32 fourth = BITS == 3 ? (words[3] >> quarter & 0x11111111u) << 3 : 0;
            codes[at] = words[quarter] | fourth;
        }
        u8 *next = escapes + first + ranks.before_lane(quarter);
        first += ranks.of_quarter(quarter);
        for (u32 left = escapes_in<BITS>(words[quarter]); left; left &= left - 1) {
            *next++ = u8(exponent_of(value_of(values, (__ffs(left) - 1) / 4)));
        }
    }
}

// Where the parts of a slab's tiles go.
struct Places {
    u8 *slab;
    // The areas of codes, offsets and escapes.
    u32 codes;
    u32 offsets;
    u32 escapes;
    // The codes of each plane in their area.
    u32 of_plane[PLANES_MAX];

    // `head` says how many bits the codes of each plane have.
    __device__ __forceinline__ Places(const Encode &coder, const u32 *head, u8 *slab) : slab(slab) {
        codes = HEADER_BYTES + GROUP_VALUES * coder.groups;
        u32 all = 0;
#pragma unroll
        for (u32 plane = 0; plane < PLANES_MAX; plane++) {
            of_plane[plane] = all;
            all += plane < coder.job.planes ? 4 * (head[1] >> (8 * plane) & 0xff) * coder.plane[plane].groups : 0;
        }
        offsets = codes + all;
        escapes = offsets + 4 * coder.tiles;
    }

    // Writes tile `number`, before whose escapes there are `before`. Whole warps.
    __device__ __forceinline__ void write(const Encode &coder, const Tile &tile, u32 number, u32 lane, u32 bits,
                                          u32 before, const uint4 (&vectors)[QUARTERS],
                                          const u32 (&words)[QUARTERS]) const {
        u32 plane = 0;
#pragma unroll
        for (u32 index = 0; index < PLANES_MAX; index++) {
            plane = index == tile.plane ? of_plane[index] : plane;
        }
        const u32 group = coder.plane[tile.plane].first_group + tile.group_in_plane;
        uint2 *mantissas = reinterpret_cast<uint2 *>(slab + HEADER_BYTES + GROUP_VALUES * group);
        u32 *own_codes = reinterpret_cast<u32 *>(slab + codes + plane + 4 * bits * tile.group_in_plane);
        if (lane == 0) {
            *reinterpret_cast<u32 *>(slab + offsets + 4 * number) = before;
        }
        if (bits == 3) {
            write_coded<3>(tile, lane, vectors, words, mantissas, own_codes, slab + escapes + before);
        } else {
            write_coded<4>(tile, lane, vectors, words, mantissas, own_codes, slab + escapes + before);
        }
    }
};

// Writes the values of a tile as they are.
template <u32 WIDTH>
__device__ __forceinline__ void write_raw(const Tile &tile, u32 lane, const uint4 (&vectors)[QUARTERS], u8 *slab) {
    if (lane >= tile.groups) {
        return;
    }
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u32 at = quarter * tile.groups + lane;
        const u32 left = values_in(tile, at);
        u8 *to = slab + tile.start + at * VECTOR;
        if (WIDTH == VECTOR) {
            if (left) {
                *reinterpret_cast<uint4 *>(to) = vectors[quarter];
            }
        } else {
#pragma unroll
            for (u32 k = 0; k < VECTOR / 2; k++) {
                if (k < left) {
                    reinterpret_cast<u16 *>(to)[k] = u16(value_of(vectors[quarter], k));
                }
            }
        }
    }
}

// Sums of the numbers of the lanes before each, and of all. Whole warps.
__device__ __forceinline__ u32 sum_before(u32 own, u32 lane, u32 &all) {
    u32 sum = own;
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 other = __shfl_up_sync(~0u, sum, step);
        sum += lane >= step ? other : 0;
    }
    all = __shfl_sync(~0u, sum, WARP - 1);
    return sum - own;
}

// Says how long a slab of a layer is; the last to do so says how wide the layer is.
__device__ __forceinline__ void tell(const Encode &coder, u32 layer, u32 bytes) {
    atomicMax(&coder.longest[layer], bytes);
    __threadfence();
    if (atomicAdd(&coder.known[layer], 1u) + 1 == coder.job.count) {
        const u32 longest = atomicExch(&coder.longest[layer], 0u);
        atomicExch(&coder.known[layer], 0u);
        const u64 width = (longest + ALIGN - 1) / ALIGN * ALIGN;
        *reinterpret_cast<volatile u64 *>(&coder.widths[layer]) = u64(coder.epoch) << 32 | width;
    }
}

// Where a layer starts in its row, once that is known; NOWHERE where it does not become so. Whole warps.
constexpr u32 NOWHERE = ~0u;

__device__ __forceinline__ u32 start_of(const Encode &coder, u32 layer, u32 lane) {
    u64 width = u64(coder.epoch) << 32;
    if (lane < layer) {
        const volatile u64 *of_layer = &coder.widths[lane];
        u32 looks = 0;
        while ((width = *of_layer) >> 32 != coder.epoch && ++looks < LOOKS_MAX) {
            __nanosleep(100);
        }
    }
    const bool is_known = __all_sync(~0u, width >> 32 == coder.epoch);
    const u32 start = __reduce_add_sync(~0u, u32(width));
    return is_known ? start : NOWHERE;
}

// Of slabs of at most TILES_MAX tiles, whose pages allow the widest vectors; a block's warps are at least half as
// many as tiles.
extern "C" __global__ void __launch_bounds__(512, 2) encode(const __grid_constant__ Encode coder) {
    extern __shared__ uint4 body[];
    __shared__ u32 tile_escapes[TILES_MAX];
    __shared__ u32 head[HEADER_BYTES / 4];
    __shared__ u32 start;
    __shared__ u64 total;
    const Job &job = coder.job;
    const u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, warps = blockDim.x / WARP;
    const u32 index = blockIdx.x, layer = blockIdx.y;
    u8 *slab = reinterpret_cast<u8 *>(body);
    u32 *counts = reinterpret_cast<u32 *>(body + (job.slab_bytes + VECTOR - 1) / VECTOR);
    // [plane][exponent], a byte each.
    u32 *code_of = counts + job.planes * EXPONENTS;
    const Move move = job.moves[job.first_move + index];
    uint4 vectors[WARP_TILES][QUARTERS];
#pragma unroll
    for (u32 turn = 0; turn < WARP_TILES; turn++) {
        const u32 number = warp + turn * warps;
        if (number < coder.tiles) {
            read_tile<VECTOR>(coder, move, tile_of(coder.plane, job.planes, number), lane, vectors[turn]);
        }
    }
    for (u32 at = thread; at < job.planes * EXPONENTS; at += blockDim.x) {
        counts[at] = 0;
    }
    for (u32 at = thread; at < TILES_MAX; at += blockDim.x) {
        tile_escapes[at] = 0;
    }
    for (u32 at = thread; at < HEADER_BYTES / 4; at += blockDim.x) {
        head[at] = 0;
    }
    if (thread == 0) {
        total = 0;
    }
    __syncthreads();
#pragma unroll
    for (u32 turn = 0; turn < WARP_TILES; turn++) {
        const u32 number = warp + turn * warps;
        if (number < coder.tiles) {
            const Tile tile = tile_of(coder.plane, job.planes, number);
            count_tile(tile, coder.plane[tile.plane].start, lane, vectors[turn], counts + tile.plane * EXPONENTS);
        }
    }
    __syncthreads();
    for (u32 plane = warp; plane < job.planes; plane += warps) {
        u8 *bytes = reinterpret_cast<u8 *>(head);
        const u32 bits = choose(coder.plane[plane], lane, counts + plane * EXPONENTS, bytes + 16 + 16 * plane,
                                code_of + plane * (EXPONENTS / 4));
        if (lane == 0) {
            bytes[4 + plane] = u8(bits);
        }
    }
    __syncthreads();
    u32 words[WARP_TILES][QUARTERS];
#pragma unroll
    for (u32 turn = 0; turn < WARP_TILES; turn++) {
        const u32 number = warp + turn * warps;
        if (number < coder.tiles) {
            const Tile tile = tile_of(coder.plane, job.planes, number);
            const u8 *codes = reinterpret_cast<const u8 *>(code_of + tile.plane * (EXPONENTS / 4));
            const u32 bits = head[1] >> (8 * tile.plane) & 0xff;
            const u32 escapes = code_tile(tile, lane, bits, codes, vectors[turn], words[turn]);
            if (lane == 0) {
                tile_escapes[number] = escapes;
            }
        }
    }
    __syncthreads();
    u32 escapes;
    const u32 before = sum_before(tile_escapes[lane], lane, escapes);
    const Places places(coder, head, slab);
    const u32 stored = min(places.escapes + escapes, job.slab_bytes);
    if (thread == 0) {
        tell(coder, layer, stored);
    }
#pragma unroll
    for (u32 turn = 0; turn < WARP_TILES; turn++) {
        const u32 number = warp + turn * warps;
        const u32 first = __shfl_sync(~0u, before, number);
        if (number < coder.tiles) {
            const Tile tile = tile_of(coder.plane, job.planes, number);
            if (stored == job.slab_bytes) {
                write_raw<VECTOR>(tile, lane, vectors[turn], slab);
            } else {
                const u32 bits = head[1] >> (8 * tile.plane) & 0xff;
                places.write(coder, tile, number, lane, bits, first, vectors[turn], words[turn]);
            }
        }
    }
    if (stored < job.slab_bytes) {
        for (u32 at = thread; at < HEADER_BYTES / 4; at += blockDim.x) {
            reinterpret_cast<u32 *>(slab)[at] = at ? head[at] : escapes;
        }
    }
    if (warp == 0) {
        const u32 of_layer = start_of(coder, layer, lane);
        if (lane == 0) {
            start = of_layer;
        }
    }
    __syncthreads();
    if (start != NOWHERE) {
        const u64 out = coder.rows + index * coder.move_step + start;
        for (u32 piece = warp; piece * PIECE < stored; piece += warps) {
            Sum sum = {0, 0};
#pragma unroll
            for (u32 turn = 0; turn < TURNS; turn++) {
                const u32 at = turn * WARP + lane, offset = piece * PIECE + at * VECTOR;
                uint4 vector = make_uint4(0, 0, 0, 0);
                if (offset < stored) {
                    const uint4 own = body[offset / VECTOR];
                    const int left = int(stored - offset);
                    vector = make_uint4(cut(own.x, left), cut(own.y, left - 4), cut(own.z, left - 8),
                                        cut(own.w, left - 12));
                    *reinterpret_cast<uint4 *>(out + offset) = vector;
                }
                sum.add(word(vector.x, vector.y), KEYS.of[2 * at]);
                sum.add(word(vector.z, vector.w), KEYS.of[2 * at + 1]);
            }
            const u64 of_piece = sum.of_warp(piece);
            if (lane == 0) {
                atomicAdd(&total, of_piece);
            }
        }
    }
    __syncthreads();
    if (thread == 0) {
        const u32 bytes = start == NOWHERE ? 0 : stored;
        coder.answers[layer * job.count + index] = make_uint4(u32(total), u32(total >> 32), start, bytes);
    }
}

enum Pass { COUNT, CODE, COPY };

template <u32 WIDTH> __device__ __forceinline__ void encode_large_slab(const Encode &coder) {
    __shared__ u32 counts[PLANES_MAX][EXPONENTS];
    __shared__ u32 code_of[PLANES_MAX][EXPONENTS / 4];
    __shared__ u32 tile_escapes[BLOCK_WARPS];
    __shared__ u32 head[HEADER_BYTES / 4];
    __shared__ u64 total;
    const Job &job = coder.job;
    const u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, warps = blockDim.x / WARP;
    const u32 index = blockIdx.x, layer = blockIdx.y;
    const u32 start = layer * coder.layer_step;
    u8 *slab = reinterpret_cast<u8 *>(coder.rows + index * coder.move_step + start);
    const Move move = job.moves[job.first_move + index];
    for (u32 at = thread; at < PLANES_MAX * EXPONENTS; at += blockDim.x) {
        counts[at / EXPONENTS][at % EXPONENTS] = 0;
    }
    for (u32 at = thread; at < HEADER_BYTES / 4; at += blockDim.x) {
        head[at] = 0;
    }
    if (thread == 0) {
        total = 0;
    }
    __syncthreads();
    u32 escapes = 0, stored = 0;
    // The pages are read once to count, once to code, and once more where that did not gain.
#pragma unroll 1
    for (u32 pass = COUNT; pass <= COPY && !stored; pass++) {
        const Places places(coder, head, slab);
#pragma unroll 1
        for (u32 first = 0; first < coder.tiles; first += warps) {
            const u32 number = first + warp;
            const bool is_there = number < coder.tiles;
            const Tile tile = tile_of(coder.plane, job.planes, is_there ? number : 0);
            uint4 vectors[QUARTERS];
            read_tile<WIDTH>(coder, move, tile, lane, vectors);
            if (pass == COUNT && is_there) {
                count_tile(tile, coder.plane[tile.plane].start, lane, vectors, counts[tile.plane]);
            } else if (pass == COPY && is_there) {
                write_raw<WIDTH>(tile, lane, vectors, slab);
            } else if (pass == CODE) {
                const u32 bits = head[1] >> (8 * tile.plane) & 0xff;
                const u8 *codes = reinterpret_cast<const u8 *>(code_of[tile.plane]);
                u32 words[QUARTERS], all;
                const u32 own = code_tile(tile, lane, bits, codes, vectors, words);
                if (lane == 0) {
                    tile_escapes[warp] = is_there ? own : 0;
                }
                __syncthreads();
                const u32 before = sum_before(lane < warps ? tile_escapes[lane] : 0, lane, all);
                const u32 of_tile = escapes + __shfl_sync(~0u, before, warp);
                escapes += all;
                if (places.escapes + escapes >= job.slab_bytes) {
                    break;
                }
                if (is_there) {
                    places.write(coder, tile, number, lane, bits, of_tile, vectors, words);
                }
                __syncthreads();
            }
        }
        __syncthreads();
        if (pass == COUNT) {
            for (u32 plane = warp; plane < job.planes; plane += warps) {
                u8 *bytes = reinterpret_cast<u8 *>(head);
                const u32 bits =
                    choose(coder.plane[plane], lane, counts[plane], bytes + 16 + 16 * plane, code_of[plane]);
                if (lane == 0) {
                    bytes[4 + plane] = u8(bits);
                }
            }
            __syncthreads();
        } else if (pass == CODE && places.escapes + escapes < job.slab_bytes) {
            stored = places.escapes + escapes;
            for (u32 at = thread; at < HEADER_BYTES / 4; at += blockDim.x) {
                reinterpret_cast<u32 *>(slab)[at] = at ? head[at] : escapes;
            }
        } else if (pass == COPY) {
            stored = job.slab_bytes;
        }
    }
    __syncthreads();
    for (u32 piece = warp; piece * PIECE < stored; piece += warps) {
        const u64 sum = sum_piece(u64(slab), piece, stored, lane);
        if (lane == 0) {
            atomicAdd(&total, sum);
        }
    }
    __syncthreads();
    if (thread == 0) {
        coder.answers[layer * job.count + index] = make_uint4(u32(total), u32(total >> 32), start, stored);
    }
}

extern "C" __global__ void __launch_bounds__(512) encode_large(const __grid_constant__ Encode coder) {
    encode_large_slab<VECTOR>(coder);
}

extern "C" __global__ void __launch_bounds__(512) encode_narrow(const __grid_constant__ Encode coder) {
    encode_large_slab<NARROW>(coder);
}
