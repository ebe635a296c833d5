// Moves slabs to an engine's pages and back, and sums them on the way.
//
// Slabs lie in a staging buffer, in an arena of GPU memory or in pinned host memory; pages are the
// engine's. One warp takes one piece of 4 KiB of one slab at a time, all of it read before the first
// byte is written, so that enough bytes are under way also over a slow link. That piece is the
// checksum's own (docs/format.md), so the bytes are summed while they are in registers, wherever in
// the pages they belong.

#include "slab.cuh"

template <u32 WIDTH, bool TO_PAGES> __device__ __forceinline__ void move_slabs(const Job &job) {
    __shared__ ulonglong2 keys[PIECE / VECTOR];
    // Parts take many instructions each, so narrow ones go one vector at a time.
    constexpr u32 BATCH = WIDTH == VECTOR ? TURNS : 1;
    const u32 lane = threadIdx.x % WARP;
    const u32 warps = gridDim.x * (blockDim.x / WARP);
    const u32 pieces = (job.slab_bytes + PIECE - 1) / PIECE;
    const u32 tasks = job.count * pieces;
    bool has_keys = false;
    for (u32 task = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; task < tasks || !has_keys; task += warps) {
        const bool is_task = task < tasks;
        const u32 index = task / pieces;
        const u32 piece = task - index * pieces;
        u64 slab = job.slab_base + index * job.slab_step + blockIdx.y * job.layer_step;
        uint4 vectors[BATCH];
        // Staged slabs are asked for before anything else: what is looked up meanwhile costs no time.
        const bool is_ahead = WIDTH == VECTOR && TO_PAGES && job.slab_step && is_task;
        if (is_ahead) {
#pragma unroll
            for (u32 i = 0; i < BATCH; i++) {
                vectors[i] = read_slab(slab, piece * PIECE + (i * WARP + lane) * VECTOR, job.slab_bytes);
            }
        }
        if (!has_keys) {
            for (u32 i = threadIdx.x; job.sums && i < PIECE / VECTOR; i += blockDim.x) {
                keys[i] = make_ulonglong2(key(2 * i), key(2 * i + 1));
            }
            __syncthreads();
            has_keys = true;
        }
        if (!is_task) {
            break;
        }
        const Move move = job.moves[job.first_move + index];
        if (!move.moved) {
            continue;
        }
        slab += job.slab_step ? 0 : move.slab_offset;
        const u64 run = WIDTH == VECTOR ? run_of(job, move.token, piece * PIECE, PIECE) : 0;
        Sum sum = {0, 0};
#pragma unroll 1
        for (u32 turn = 0; turn < TURNS; turn += BATCH) {
            const u32 first = (turn * WARP + lane) * VECTOR;
            const u32 offset = piece * PIECE + first;
            if (!is_ahead) {
#pragma unroll
                for (u32 i = 0; i < BATCH; i++) {
                    const u32 step = i * WARP * VECTOR;
                    if (WIDTH == VECTOR && run) {
                        const u64 from = (TO_PAGES ? slab + offset : run + first) + step;
                        vectors[i] = __ldcs(reinterpret_cast<const uint4 *>(from));
                    } else {
                        vectors[i] = TO_PAGES ? read_slab(slab, offset + step, job.slab_bytes)
                                              : gather<WIDTH>(job, move.token, offset + step, job.slab_bytes);
                    }
                }
            }
            if (job.sums) {
#pragma unroll
                for (u32 i = 0; i < BATCH; i++) {
                    const ulonglong2 keyed = keys[first / VECTOR + i * WARP];
                    sum.add(word(vectors[i].x, vectors[i].y), keyed.x);
                    sum.add(word(vectors[i].z, vectors[i].w), keyed.y);
                }
            }
#pragma unroll
            for (u32 i = 0; i < BATCH; i++) {
                const u32 step = i * WARP * VECTOR;
                if (WIDTH == VECTOR && run) {
                    const u64 to = (TO_PAGES ? run + first : slab + offset) + step;
                    __stcs(reinterpret_cast<uint4 *>(to), vectors[i]);
                } else if (TO_PAGES) {
                    scatter<WIDTH>(job, move.token, offset + step, job.slab_bytes, vectors[i]);
                } else {
                    write_slab(slab, offset + step, job.slab_bytes, vectors[i]);
                }
            }
        }
        if (job.sums) {
            const u64 of_piece = sum.of_warp(piece);
            if (lane == 0) {
                const u64 row = u64(job.first_layer + blockIdx.y) * job.all_moves;
                atomicAdd(job.sums + row + job.first_move + index, of_piece);
            }
        }
    }
}

#define KERNEL(NAME, WIDTH, TO_PAGES)                                                         \
    extern "C" __global__ void __launch_bounds__(512) NAME(const __grid_constant__ Job job) { \
        move_slabs<WIDTH, TO_PAGES>(job);                                                     \
    }

KERNEL(scatter, VECTOR, true)
KERNEL(scatter_narrow, NARROW, true)
KERNEL(gather, VECTOR, false)
KERNEL(gather_narrow, NARROW, false)

struct Slots {
    const Move *moves;
    // [layer][move]
    u64 *expected;
    // The same; null where all slabs are raw.
    Stored *stored;
    // The arena's first byte, in pinned host memory.
    u64 base;
    u32 count;
    u32 layers;
    // Offsets in a header page: the layers that it holds, the first slab's entry (where it is stored, then
    // its checksum), the next one's.
    u32 layers_at;
    u32 slabs_at;
    u32 entry_bytes;
    u32 unused;
};

// One warp a move: fetches what the slots say of their slabs. Their header pages are rarely in
// a cache of the host, so the host would take longer.
extern "C" __global__ void __launch_bounds__(512) expect(const __grid_constant__ Slots slots) {
    const u32 lane = threadIdx.x % WARP;
    const u32 warps = gridDim.x * (blockDim.x / WARP);
    for (u32 index = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; index < slots.count; index += warps) {
        const u64 page = slots.base + slots.moves[index].header_offset;
        const u32 start = *reinterpret_cast<const u32 *>(page + slots.layers_at);
        const u32 end = *reinterpret_cast<const u32 *>(page + slots.layers_at + 4);
        for (u32 layer = lane; layer < slots.layers; layer += WARP) {
            u64 sum = 0;
            Stored stored = {0, 0};
            if (layer >= start && layer < end) {
                const u64 at = page + slots.slabs_at + (layer - start) * slots.entry_bytes;
                const uint4 entry = *reinterpret_cast<const uint4 *>(at);
                stored = {entry.x, entry.y};
                sum = word(entry.z, entry.w);
            }
            const u64 at = u64(layer) * slots.count + index;
            slots.expected[at] = sum;
            if (slots.stored) {
                slots.stored[at] = stored;
            }
        }
    }
}

struct Ends {
    const Move *moves;
    // [layer][move]: taken, and left zero.
    u64 *sums;
    // [layer][move]
    const u64 *expected;
    // The same; null where all slabs are raw.
    const Stored *stored;
    // By layer, in pinned host memory: the first move whose sum differs, or `count`.
    u32 *answers;
    // Of a raw slab.
    u32 slab_bytes;
    u32 count;
    u32 first_layer;
    // Were the slabs summed? Else their sums are 0 where they are well formed.
    u32 are_summed;
};

// One block a layer: compares what a load read with what its slots say.
extern "C" __global__ void __launch_bounds__(512) finish(const __grid_constant__ Ends ends) {
    __shared__ u32 first_wrong;
    if (threadIdx.x == 0) {
        first_wrong = ends.count;
    }
    __syncthreads();
    const u32 layer = ends.first_layer + blockIdx.x;
    const u64 row = u64(layer) * ends.count;
    for (u32 index = threadIdx.x; index < ends.count; index += blockDim.x) {
        const u32 bytes = ends.stored ? ends.stored[row + index].bytes : ends.slab_bytes;
        const u64 sum = ends.sums[row + index];
        const bool is_right = ends.are_summed ? mix(sum ^ mix(bytes)) == ends.expected[row + index] : sum == 0;
        ends.sums[row + index] = 0;
        if (ends.moves[index].moved && !is_right) {
            atomicMin(&first_wrong, index);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ends.answers[layer] = first_wrong;
    }
}
