// Moves the pieces of a transfer plan between slabs and an engine's pages.
//
// Slabs lie in a staging buffer, in an arena of GPU memory or in pinned host memory; pages are the
// engine's. One warp moves up to 8 x 32 vectors of one piece of one layer at a time, all of them read
// before the first is written, so that enough bytes are under way also over a slow link. `Piece` and
// `Job` are mirrored in src/device/cuda/kernels.rs.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 PLANES_MAX = 4;
constexpr u32 LAYERS_MAX = 16;
constexpr u32 WARP = 32;
// Vectors of one lane in one task.
constexpr u32 BATCH = 8;

struct Piece {
    u64 page_offset;
    u32 slab_offset;
    // Which slab of the transfer.
    u32 slab;
    u32 rows;
    u32 row_bytes;
    u32 plane;
    u32 unused;
};

struct Job {
    const Piece *pieces;
    // By slab, to be added to `slab_base`; null where slabs are `slab_step` apart from `first_slab` on.
    const u64 *slab_offsets;
    u64 slab_base;
    u64 slab_step;
    // From one layer's slab to the next one's.
    u64 layer_step;
    u32 first_slab;
    u32 count;
    // Tasks of the longest piece.
    u32 tasks;
    u32 unused;
    u64 page_pitch[PLANES_MAX];
    u64 slab_pitch[PLANES_MAX];
    u64 page_bases[LAYERS_MAX][PLANES_MAX];
};

template <class Vector, bool TO_PAGES>
__device__ __forceinline__ void move_pieces(const Job &job) {
    const u32 lane = threadIdx.x % WARP;
    const u32 warps = gridDim.x * (blockDim.x / WARP);
    const u64 tasks = u64(job.count) * job.tasks;
    for (u64 task = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; task < tasks; task += warps) {
        const u32 index = u32(task / job.tasks);
        const u32 begin = u32(task - u64(index) * job.tasks) * (WARP * BATCH);
        const Piece piece = job.pieces[index];
        const u32 row_vectors = piece.row_bytes / sizeof(Vector);
        const u32 end = piece.rows * row_vectors;
        if (begin >= end) {
            continue;
        }
        const u64 slab_offset = job.slab_offsets ? job.slab_offsets[piece.slab]
                                                 : u64(piece.slab - job.first_slab) * job.slab_step;
        const u64 slab = job.slab_base + slab_offset + blockIdx.y * job.layer_step + piece.slab_offset;
        const u64 page = job.page_bases[blockIdx.y][piece.plane] + piece.page_offset;
        const u64 slab_pitch = job.slab_pitch[piece.plane];
        const u64 page_pitch = job.page_pitch[piece.plane];
        const bool single = piece.rows == 1;

        Vector vectors[BATCH];
        u64 targets[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const u32 at = begin + lane + i * WARP;
            if (at < end) {
                const u32 row = single ? 0 : at / row_vectors;
                const u64 column = u64(at - row * row_vectors) * sizeof(Vector);
                const u64 in_slab = slab + row * slab_pitch + column;
                const u64 in_page = page + row * page_pitch + column;
                vectors[i] = __ldcs(reinterpret_cast<const Vector *>(TO_PAGES ? in_slab : in_page));
                targets[i] = TO_PAGES ? in_page : in_slab;
            }
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            if (begin + lane + i * WARP < end) {
                __stcs(reinterpret_cast<Vector *>(targets[i]), vectors[i]);
            }
        }
    }
}

#define KERNELS(BYTES, VECTOR)                                                                          \
    extern "C" __global__ void __launch_bounds__(512) scatter_##BYTES(const __grid_constant__ Job job) { \
        move_pieces<VECTOR, true>(job);                                                                 \
    }                                                                                                   \
    extern "C" __global__ void __launch_bounds__(512) gather_##BYTES(const __grid_constant__ Job job) {  \
        move_pieces<VECTOR, false>(job);                                                                \
    }

KERNELS(16, uint4)
KERNELS(4, u32)
KERNELS(2, unsigned short)
KERNELS(1, unsigned char)
