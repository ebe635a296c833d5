// Moves slabs to an engine's pages and back, and sums them on the way.
//
// Slabs lie in a staging buffer, in an arena of GPU memory or in pinned host memory; pages are the
// engine's. One warp takes one piece of 4 KiB of one slab at a time, all of it read before the first
// byte is written, so that enough bytes are under way also over a slow link. That piece is the
// checksum's own (docs/format.md), so the bytes are summed while they are in registers, wherever in
// the pages they belong. The structs are mirrored in src/device/cuda/kernels.rs.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 PLANES_MAX = 4;
constexpr u32 LAYERS_MAX = 16;
constexpr u32 WARP = 32;
// Bytes that are summed together.
constexpr u32 PIECE = 4096;
// Bytes that a lane takes at a time on the slab's side, and how often it does in a piece.
constexpr u32 VECTOR = 16;
constexpr u32 TURNS = PIECE / (WARP * VECTOR);

struct Move {
    // From the arena's first byte to the slab of layer 0, were all layers one `layer_step` apart.
    u64 slab_offset;
    // To the header page of the slot.
    u64 header_offset;
    // The prompt position of the block's first token.
    u32 token;
    // 0: all of its tokens are left alone.
    u32 moved;
};

struct Plane {
    u64 page_step;
    u64 token_step;
    u64 head_step;
    // See `divide`.
    u64 token_magic;
    u64 head_magic;
    // Where the plane starts in a slab.
    u32 slab_start;
    u32 token_bytes;
    u32 head_bytes;
    u32 unused;
};

struct Job {
    const Move *moves;
    // The engine's page numbers, from page `first_page` of the prompt on.
    const u32 *pages;
    // [layer][move], to be added to; null where nobody wants sums.
    u64 *sums;
    u64 slab_base;
    // From one move's slab to the next one's; 0 where slabs are at their `slab_offset`.
    u64 slab_step;
    // From one layer's slab to the next one's.
    u64 layer_step;
    u64 page_magic;
    u32 page_tokens;
    u32 first_page;
    // Tokens below this prompt position are left alone.
    u32 from_token;
    // Of the job, and how many; all that the transfer has.
    u32 first_move;
    u32 count;
    u32 all_moves;
    u32 first_layer;
    u32 planes;
    u32 slab_bytes;
    // Every piece lies in at most two runs of bytes in the pages: see `run_of`.
    u32 long_runs;
    Plane plane[PLANES_MAX];
    u64 page_bases[LAYERS_MAX][PLANES_MAX];
};

// n / d where `magic` is 2^64 / d, rounded down, + 1, or 0 for d = 1: exact for every n below 2^32.
__device__ __forceinline__ u32 divide(u32 n, u64 magic) { return magic ? u32(__umul64hi(u64(n), magic)) : n; }

// splitmix64's finaliser.
__device__ __forceinline__ u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// The checksum's key for word `index` of a piece.
__device__ __forceinline__ u64 key(u32 index) { return mix(0x7374656d6b762d30ull + (index + 1) * 0x9e3779b97f4a7c15ull); }

__device__ __forceinline__ u64 word(u32 low, u32 high) { return u64(high) << 32 | low; }

// The half of a vector that byte `at` is in.
__device__ __forceinline__ u64 half(const uint4 &vector, u32 at) {
    return at < 8 ? word(vector.x, vector.y) : word(vector.z, vector.w);
}

struct Sum {
    u64 product;
    u64 plain;

    __device__ __forceinline__ void add(u64 value, u64 key) {
        const u64 keyed = value ^ key;
        product += u64(u32(keyed)) * (keyed >> 32);
        plain += value;
    }

    // The sum of a whole piece, in every lane.
    __device__ __forceinline__ u64 of_warp(u32 piece) {
        for (u32 step = WARP / 2; step > 0; step /= 2) {
            product += __shfl_xor_sync(~0u, product, step);
            plain += __shfl_xor_sync(~0u, plain, step);
        }
        return mix(product + mix(plain ^ mix(piece)));
    }
};

// Where the byte at `offset` of the slab of the block at `token` belongs in the pages; 0 where it is
// left alone.
__device__ __forceinline__ u64 place(const Job &job, u32 token, u32 offset) {
    u32 index = 0;
#pragma unroll
    for (u32 next = 1; next < PLANES_MAX; next++) {
        index += next < job.planes && offset >= job.plane[next].slab_start;
    }
    const Plane &plane = job.plane[index];
    const u32 in_plane = offset - plane.slab_start;
    const u32 number = divide(in_plane, plane.token_magic);
    const u32 in_token = in_plane - number * plane.token_bytes;
    const u32 head = divide(in_token, plane.head_magic);
    const u32 at = token + number;
    if (at < job.from_token) {
        return 0;
    }
    const u32 page = divide(at, job.page_magic);
    return job.page_bases[blockIdx.y][index] + job.pages[page - job.first_page] * plane.page_step +
           (at - page * job.page_tokens) * plane.token_step + head * plane.head_step +
           (in_token - head * plane.head_bytes);
}

template <u32 WIDTH> struct Part;
template <> struct Part<4> { typedef u32 Type; };
template <> struct Part<2> { typedef u16 Type; };
template <> struct Part<1> { typedef u8 Type; };

// Writes 16 bytes of a slab, or as many as it still has at `offset`, to the pages. `WIDTH` divides
// whatever lies in one piece there.
template <u32 WIDTH> __device__ __forceinline__ void scatter(const Job &job, u32 token, u32 offset, const uint4 &vector) {
    if constexpr (WIDTH == VECTOR) {
        if (offset < job.slab_bytes) {
            if (const u64 to = place(job, token, offset)) {
                __stcs(reinterpret_cast<uint4 *>(to), vector);
            }
        }
    } else {
        typedef typename Part<WIDTH>::Type Type;
#pragma unroll 1
        for (u32 at = 0; at < VECTOR && offset + at < job.slab_bytes; at += WIDTH) {
            if (const u64 to = place(job, token, offset + at)) {
                *reinterpret_cast<Type *>(to) = Type(half(vector, at) >> (at % 8 * 8));
            }
        }
    }
}

// Reads 16 bytes of a slab out of the pages; zeros behind its end.
template <u32 WIDTH> __device__ __forceinline__ uint4 gather(const Job &job, u32 token, u32 offset) {
    if constexpr (WIDTH == VECTOR) {
        return offset < job.slab_bytes ? __ldcs(reinterpret_cast<const uint4 *>(place(job, token, offset)))
                                       : make_uint4(0, 0, 0, 0);
    } else {
        typedef typename Part<WIDTH>::Type Type;
        u64 low = 0, high = 0;
#pragma unroll 1
        for (u32 at = 0; at < VECTOR && offset + at < job.slab_bytes; at += WIDTH) {
            const u64 part = u64(*reinterpret_cast<const Type *>(place(job, token, offset + at))) << (at % 8 * 8);
            (at < 8 ? low : high) |= part;
        }
        return make_uint4(u32(low), u32(low >> 32), u32(high), u32(high >> 32));
    }
}

// Bytes of `value` from number `count` on become zero.
__device__ __forceinline__ u32 cut(u32 value, int count) {
    return count >= 4 ? value : count <= 0 ? 0 : value & ((1u << (count * 8)) - 1);
}

// Reads 16 bytes of a slab; zeros behind its end. Strides leave room to read them whole.
__device__ __forceinline__ uint4 read_slab(u64 slab, u32 offset, u32 slab_bytes) {
    if (offset >= slab_bytes) {
        return make_uint4(0, 0, 0, 0);
    }
    const uint4 vector = __ldcs(reinterpret_cast<const uint4 *>(slab + offset));
    const int left = int(slab_bytes - offset);
    return left >= int(VECTOR) ? vector
                               : make_uint4(cut(vector.x, left), cut(vector.y, left - 4), cut(vector.z, left - 8),
                                            cut(vector.w, left - 12));
}

// Writes 16 bytes of a slab, or as many as it still has.
__device__ __forceinline__ void write_slab(u64 slab, u32 offset, u32 slab_bytes, const uint4 &vector) {
    if (offset + VECTOR <= slab_bytes) {
        __stcs(reinterpret_cast<uint4 *>(slab + offset), vector);
        return;
    }
#pragma unroll 1
    for (u32 at = 0; at < VECTOR && offset + at < slab_bytes; at++) {
        *reinterpret_cast<u8 *>(slab + offset + at) = u8(half(vector, at) >> (at % 8 * 8));
    }
}

// Where a whole piece lies in the pages in one run, and is moved whole; else 0. The same in every lane. In
// at most two runs the first byte and the last vector are as far apart as in the slab only where the
// second run follows the first. Only the first token can be one that is left alone.
__device__ __forceinline__ u64 run_of(const Job &job, u32 token, u32 offset) {
    if (!job.long_runs || offset + PIECE > job.slab_bytes) {
        return 0;
    }
    const u64 first = place(job, token, offset);
    return first && place(job, token, offset + PIECE - VECTOR) - first == PIECE - VECTOR ? first : 0;
}

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
        const u64 run = WIDTH == VECTOR ? run_of(job, move.token, piece * PIECE) : 0;
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
                                              : gather<WIDTH>(job, move.token, offset + step);
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
                    scatter<WIDTH>(job, move.token, offset + step, vectors[i]);
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

#define KERNELS(WIDTH)                                                                                   \
    extern "C" __global__ void __launch_bounds__(512) scatter_##WIDTH(const __grid_constant__ Job job) { \
        move_slabs<WIDTH, true>(job);                                                                    \
    }                                                                                                    \
    extern "C" __global__ void __launch_bounds__(512) gather_##WIDTH(const __grid_constant__ Job job) {  \
        move_slabs<WIDTH, false>(job);                                                                   \
    }

KERNELS(16)
KERNELS(4)
KERNELS(2)
KERNELS(1)

struct Slots {
    const Move *moves;
    // [layer][move]
    u64 *expected;
    // The arena's first byte, in pinned host memory.
    u64 base;
    u32 count;
    u32 layers;
    // Offsets in a header page: the layers that it holds, the first slab's checksum, the next one's.
    u32 layers_at;
    u32 checksums_at;
    u32 entry_bytes;
    u32 unused;
};

// One warp a move: fetches what the slots say that their slabs sum to. Their header pages are rarely in
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
            if (layer >= start && layer < end) {
                sum = *reinterpret_cast<const u64 *>(page + slots.checksums_at + (layer - start) * slots.entry_bytes);
            }
            slots.expected[u64(layer) * slots.count + index] = sum;
        }
    }
}

struct Ends {
    const Move *moves;
    // [layer][move]: taken, and left zero.
    u64 *sums;
    // [layer][move]
    const u64 *expected;
    // By layer, in pinned host memory: the first move whose sum differs, or `count`.
    u32 *answers;
    // mix(bytes of a slab).
    u64 mixed_bytes;
    u32 count;
    u32 first_layer;
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
        const u64 sum = mix(ends.sums[row + index] ^ ends.mixed_bytes);
        ends.sums[row + index] = 0;
        if (ends.moves[index].moved && sum != ends.expected[row + index]) {
            atomicMin(&first_wrong, index);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ends.answers[layer] = first_wrong;
    }
}
