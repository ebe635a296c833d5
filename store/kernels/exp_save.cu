// Encodes slabs with codec `exp` (docs/format.md): raw slabs in staging memory become stored ones.
//
// `measure`, one block a slab, counts exponents: that gives the header and the length. `widen`, one block a
// layer, finds the longest slab. `encode`, one block a slab, knows from that where the layers of a slot go
// one behind the other, and writes and sums the stored bytes. `answer` tells the host, in whole lines: the
// link is busy with copies, and many small writes would wait for it. Every encoder writes the same bytes.

#include "exp.cuh"

constexpr u32 EXPONENTS = 256;
// As many tables of counts, so that warps seldom wait for each other's.
constexpr u32 TABLES = 4;

// A slab as it was stored: mirrored in src/device/cuda/exp_save.rs.
struct Written {
    // The sum of its pieces.
    u64 sum;
    // From the first byte of the slot's row.
    u32 offset;
    u32 bytes;
};

struct Encode {
    // The raw slab of the first move and layer, from one move to the next, from one layer to the next.
    u64 raw;
    u64 move_step;
    u64 layer_step;
    // The first move's row; rows are `move_step` apart.
    u64 rows;
    // [layer][move], HEADER_BYTES each.
    u8 *headers;
    // [layer][move]: bytes to be stored.
    u32 *sizes;
    // [layer]: the longest of these, a multiple of ALIGN.
    u32 *widest;
    // [layer][move]
    Written *written;
    // The same, in pinned host memory.
    uint4 *answers;
    CodedPlane plane[PLANES_MAX];
    u32 planes;
    u32 tiles;
    u32 groups;
    u32 slab_bytes;
    // Moves.
    u32 count;
    // Of all moves and layers.
    u32 slabs;
    // Do all planes start on multiples of VECTOR?
    u32 aligned;
};

__device__ __forceinline__ u32 exponent_of(u32 value) { return value >> 7 & 0xff; }

// Eight values from `offset` on, or as many as there are before `end`; zeros behind them.
__device__ __forceinline__ uint4 read_values(const Encode &job, u64 slab, u32 offset, u32 end) {
    if (offset >= end) {
        return make_uint4(0, 0, 0, 0);
    }
    if (job.aligned && offset + VECTOR <= end) {
        return *reinterpret_cast<const uint4 *>(slab + offset);
    }
    return read_one_by_one(slab, offset, end);
}

// Value `k` of eight.
__device__ __forceinline__ u32 value_of(const uint4 &values, u32 k) {
    const u32 pair = k < 4 ? (k < 2 ? values.x : values.y) : (k < 6 ? values.z : values.w);
    return k % 2 ? pair >> 16 : pair & 0xffff;
}

// Does an exponent come before another in the order of codes?
__device__ __forceinline__ u32 is_before(u32 its_count, u32 its, u32 count, u32 own) {
    return its_count > count || (its_count == count && its < own);
}

extern "C" __global__ void __launch_bounds__(512) measure(const __grid_constant__ Encode job) {
    __shared__ u32 tables[TABLES][EXPONENTS];
    __shared__ uint4 four_counts[EXPONENTS / 4];
    __shared__ u32 head[HEADER_BYTES / 4];
    // Values beyond the first 7 and 15 exponents.
    __shared__ u32 beyond[2];
    const u32 thread = threadIdx.x, index = blockIdx.x, layer = blockIdx.y;
    const u64 slab = job.raw + index * job.move_step + layer * job.layer_step;
    u32 *counts = reinterpret_cast<u32 *>(four_counts);
    u8 *bytes_of_head = reinterpret_cast<u8 *>(head);
    u32 escapes = 0, codes = 0;
    if (thread < HEADER_BYTES / 4) {
        head[thread] = 0;
    }
    for (u32 number = 0; number < job.planes; number++) {
        const CodedPlane plane = job.plane[number];
        for (u32 at = thread; at < TABLES * EXPONENTS; at += blockDim.x) {
            tables[at / EXPONENTS][at % EXPONENTS] = 0;
        }
        if (thread < 2) {
            beyond[thread] = 0;
        }
        __syncthreads();
        u32 *table = tables[thread / WARP % TABLES];
        for (u32 offset = plane.start + thread * VECTOR; offset < plane.end; offset += blockDim.x * VECTOR) {
            const uint4 values = read_values(job, slab, offset, plane.end);
            const u32 left = min((plane.end - offset) / 2, VECTOR / 2);
#pragma unroll
            for (u32 k = 0; k < VECTOR / 2; k++) {
                if (k < left) {
                    atomicAdd(&table[exponent_of(value_of(values, k))], 1u);
                }
            }
        }
        __syncthreads();
        for (u32 own = thread; own < EXPONENTS; own += blockDim.x) {
            u32 count = 0;
            for (u32 other = 0; other < TABLES; other++) {
                count += tables[other][own];
            }
            counts[own] = count;
        }
        __syncthreads();
        for (u32 own = thread; own < EXPONENTS; own += blockDim.x) {
            const u32 count = counts[own];
            u32 rank = 0;
#pragma unroll 4
            for (u32 other = 0; other < EXPONENTS; other += 4) {
                const uint4 four = four_counts[other / 4];
                rank += is_before(four.x, other, count, own) + is_before(four.y, other + 1, count, own) +
                        is_before(four.z, other + 2, count, own) + is_before(four.w, other + 3, count, own);
            }
            if (rank < 15) {
                bytes_of_head[16 + 16 * number + rank] = u8(own);
            }
            if (rank >= 7 && count) {
                atomicAdd(&beyond[0], count);
            }
            if (rank >= 15 && count) {
                atomicAdd(&beyond[1], count);
            }
        }
        __syncthreads();
        const bool three = 12 * plane.groups + beyond[0] <= 16 * plane.groups + beyond[1];
        const u32 bits = three ? 3 : 4;
        if (thread == 0) {
            bytes_of_head[4 + number] = u8(bits);
        }
        if (three && thread >= 7 && thread < 16) {
            bytes_of_head[16 + 16 * number + thread] = 0;
        }
        escapes += three ? beyond[0] : beyond[1];
        codes += 4 * bits * plane.groups;
        __syncthreads();
    }
    const u32 place = layer * job.count + index;
    if (thread == 0) {
        head[0] = escapes;
        const u32 bytes = HEADER_BYTES + GROUP_VALUES * job.groups + codes + 4 * job.tiles + escapes;
        job.sizes[place] = min(bytes, job.slab_bytes);
    }
    __syncthreads();
    if (thread < HEADER_BYTES / 4) {
        reinterpret_cast<u32 *>(job.headers)[place * (HEADER_BYTES / 4) + thread] = head[thread];
    }
}

extern "C" __global__ void __launch_bounds__(512) widen(const __grid_constant__ Encode job) {
    __shared__ u32 longest;
    if (threadIdx.x == 0) {
        longest = 0;
    }
    __syncthreads();
    const u32 layer = blockIdx.x;
    u32 own = 0;
    for (u32 index = threadIdx.x; index < job.count; index += blockDim.x) {
        own = max(own, job.sizes[layer * job.count + index]);
    }
    atomicMax(&longest, own);
    __syncthreads();
    if (threadIdx.x == 0) {
        job.widest[layer] = (longest + ALIGN - 1) / ALIGN * ALIGN;
    }
}

// The code word of the values of one lane in each quarter of a tile, each quarter's as if codes had four
// bits, and their mantissas. Behind the end of the plane both are zero.
__device__ __forceinline__ void code_tile(const Encode &job, u64 slab, const Tile &tile, u32 lane, const u8 *code_of,
                                          u32 (&words)[QUARTERS], uint2 (&mantissas)[QUARTERS]) {
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u32 offset = tile.start + (quarter * tile.groups + lane) * VECTOR;
        const bool is_there = lane < tile.groups && offset < tile.end;
        const uint4 values = read_values(job, slab, is_there ? offset : tile.end, tile.end);
        const u32 left = is_there ? min((tile.end - offset) / 2, VECTOR / 2) : 0;
        u32 low = 0, high = 0, codes = 0;
#pragma unroll
        for (u32 k = 0; k < VECTOR / 2; k++) {
            const u32 value = value_of(values, k);
            const u32 mantissa = (value >> 8 & 0x80) | (value & 0x7f);
            (k < 4 ? low : high) |= mantissa << (k % 4 * 8);
            codes |= k < left ? u32(code_of[exponent_of(value)]) << (4 * k) : 0;
        }
        words[quarter] = codes;
        mantissas[quarter] = make_uint2(low, high);
    }
}

__device__ __forceinline__ u32 escapes_of(u32 bits, u32 word) {
    return bits == 3 ? escapes_in<3>(word) : escapes_in<4>(word);
}

// Writes one tile whose first escape is number `start`.
template <u32 BITS>
__device__ __forceinline__ void write_coded(const Encode &job, u64 slab, const Tile &tile, u32 lane, const u8 *code_of,
                                            u64 mantissas_at, u64 codes_at, u64 escapes_at) {
    u32 words[QUARTERS], first[QUARTERS];
    uint2 mantissas[QUARTERS];
    code_tile(job, slab, tile, lane, code_of, words, mantissas);
    rank_escapes<BITS>(words, lane, tile.groups, ~0u, first);
    if (lane >= tile.groups) {
        return;
    }
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        const u32 at = quarter * tile.groups + lane;
        reinterpret_cast<uint2 *>(mantissas_at)[at] = mantissas[quarter];
        if (quarter < BITS) {
            u32 word = words[quarter];
            if constexpr (BITS == 3) {
                word |= (words[3] >> quarter & 0x11111111u) << 3;
            }
            reinterpret_cast<u32 *>(codes_at)[at] = word;
        }
        u32 next = first[quarter];
        for (u32 left = escapes_in<BITS>(words[quarter]); left; left &= left - 1) {
            const u32 value = tile.start + at * VECTOR + (__ffs(left) - 1) / 4 * 2;
            *reinterpret_cast<u8 *>(escapes_at + next) = u8(exponent_of(*reinterpret_cast<const u16 *>(slab + value)));
            next++;
        }
    }
}

extern "C" __global__ void __launch_bounds__(512) encode(const __grid_constant__ Encode job) {
    __shared__ ulonglong2 keys[PIECE / VECTOR];
    __shared__ u32 head[HEADER_BYTES / 4];
    __shared__ u8 code_of[PLANES_MAX][EXPONENTS];
    __shared__ u64 total;
    const u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, warps = blockDim.x / WARP;
    const u32 index = blockIdx.x, layer = blockIdx.y;
    const u32 place = layer * job.count + index;
    const u64 slab = job.raw + index * job.move_step + layer * job.layer_step;
    u32 offset = 0;
    for (u32 before = 0; before < layer; before++) {
        offset += job.widest[before];
    }
    const u64 out = job.rows + index * job.move_step + offset;
    const u32 stored = job.sizes[place];
    if (thread == 0) {
        total = 0;
    }
    if (thread < HEADER_BYTES / 4) {
        head[thread] = reinterpret_cast<const u32 *>(job.headers)[place * (HEADER_BYTES / 4) + thread];
    }
    make_keys(keys);
    if (stored == job.slab_bytes) {
        for (u32 at = thread * VECTOR; at < stored; at += blockDim.x * VECTOR) {
            write_slab(out, at, stored, read_slab(slab, at, stored));
        }
    } else {
        for (u32 at = thread; at < PLANES_MAX * EXPONENTS; at += blockDim.x) {
            const u32 bits = head[1] >> (at / EXPONENTS * 8) & 0xff;
            code_of[at / EXPONENTS][at % EXPONENTS] = u8((1u << bits) - 1);
        }
        __syncthreads();
        if (thread < 16 * PLANES_MAX) {
            const u32 plane = thread / 16, code = thread % 16;
            const u32 bits = head[1] >> (plane * 8) & 0xff;
            if (plane < job.planes && code < (1u << bits) - 1) {
                code_of[plane][reinterpret_cast<const u8 *>(head)[16 + thread]] = u8(code);
            }
        }
        if (thread < HEADER_BYTES / 4) {
            reinterpret_cast<u32 *>(out)[thread] = head[thread];
        }
        __syncthreads();
        u32 codes_in_plane[PLANES_MAX];
        u32 all = 0;
#pragma unroll
        for (u32 plane = 0; plane < PLANES_MAX; plane++) {
            codes_in_plane[plane] = all;
            all += plane < job.planes ? 4 * (head[1] >> (8 * plane) & 0xff) * job.plane[plane].groups : 0;
        }
        const u64 codes_at = out + HEADER_BYTES + GROUP_VALUES * job.groups;
        u32 *offsets = reinterpret_cast<u32 *>(codes_at + all);
        const u64 escapes_at = codes_at + all + 4 * job.tiles;
        // The escapes of each tile, then of those before it.
        for (u32 number = warp; number < job.tiles; number += warps) {
            const Tile tile = tile_of(job.plane, job.planes, number);
            const u32 bits = head[1] >> (8 * tile.plane) & 0xff;
            u32 words[QUARTERS];
            uint2 mantissas[QUARTERS];
            code_tile(job, slab, tile, lane, code_of[tile.plane], words, mantissas);
            u32 count = 0;
#pragma unroll
            for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
                count += lane < tile.groups ? __popc(escapes_of(bits, words[quarter])) : 0;
            }
            count = __reduce_add_sync(~0u, count);
            if (lane == 0) {
                offsets[number] = count;
            }
        }
        __syncthreads();
        if (warp == 0) {
            u32 before = 0;
            for (u32 start = 0; start < job.tiles; start += WARP) {
                const u32 own = start + lane < job.tiles ? offsets[start + lane] : 0;
                u32 sum = own;
                for (u32 step = 1; step < WARP; step *= 2) {
                    const u32 other = __shfl_up_sync(~0u, sum, step);
                    sum += lane >= step ? other : 0;
                }
                if (start + lane < job.tiles) {
                    offsets[start + lane] = before + sum - own;
                }
                before += __shfl_sync(~0u, sum, WARP - 1);
            }
        }
        __syncthreads();
        for (u32 number = warp; number < job.tiles; number += warps) {
            const Tile tile = tile_of(job.plane, job.planes, number);
            const u32 bits = head[1] >> (8 * tile.plane) & 0xff;
            u32 codes = 0;
#pragma unroll
            for (u32 plane = 0; plane < PLANES_MAX; plane++) {
                codes = plane == tile.plane ? codes_in_plane[plane] : codes;
            }
            const u64 mantissas = out + HEADER_BYTES + GROUP_VALUES * (job.plane[tile.plane].first_group + tile.group_in_plane);
            const u64 words = codes_at + codes + 4 * bits * tile.group_in_plane;
            const u64 escapes = escapes_at + offsets[number];
            if (bits == 3) {
                write_coded<3>(job, slab, tile, lane, code_of[tile.plane], mantissas, words, escapes);
            } else {
                write_coded<4>(job, slab, tile, lane, code_of[tile.plane], mantissas, words, escapes);
            }
        }
    }
    __syncthreads();
    for (u32 piece = warp; piece * PIECE < stored; piece += warps) {
        const u64 sum = sum_piece(keys, out, piece, stored, lane);
        if (lane == 0) {
            atomicAdd(&total, sum);
        }
    }
    __syncthreads();
    if (thread == 0) {
        job.written[place] = {total, offset, stored};
    }
}

extern "C" __global__ void __launch_bounds__(512) answer(const __grid_constant__ Encode job) {
    const u32 slab = blockIdx.x * blockDim.x + threadIdx.x;
    if (slab < job.slabs) {
        job.answers[slab] = reinterpret_cast<const uint4 *>(job.written)[slab];
    }
}
