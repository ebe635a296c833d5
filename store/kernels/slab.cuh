// What the kernels share: the parameters of a transfer, the checksum, and where the bytes of a slab
// belong in an engine's pages. The structs are mirrored in src/device/cuda/kernels.rs.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 PLANES_MAX = 4;
constexpr u32 LAYERS_MAX = 32;
constexpr u32 WARP = 32;
// Bytes that are summed together.
constexpr u32 PIECE = 4096;
// Bytes that a lane takes at a time on the slab's side, and how often it does in a piece.
constexpr u32 VECTOR = 16;
constexpr u32 TURNS = PIECE / (WARP * VECTOR);
// What kernels are made for where the pages do not allow such vectors: they ask the job.
constexpr u32 NARROW = 1;

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

// A slab as its slot stores it.
struct Stored {
    // From the first byte of the slot's payload.
    u32 offset;
    u32 bytes;
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
    // The width of the vectors that the pages allow: VECTOR, 4, 2 or 1.
    u32 width;
    u32 unused;
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

// The first bytes of `value`, as many as a narrow vector has, go to the pages.
__device__ __forceinline__ void put_narrow(u64 to, u32 width, u64 value) {
    if (width == 4) {
        *reinterpret_cast<u32 *>(to) = u32(value);
    } else if (width == 2) {
        *reinterpret_cast<u16 *>(to) = u16(value);
    } else {
        *reinterpret_cast<u8 *>(to) = u8(value);
    }
}

__device__ __forceinline__ u64 get_narrow(u64 from, u32 width) {
    if (width == 4) {
        return *reinterpret_cast<const u32 *>(from);
    }
    return width == 2 ? *reinterpret_cast<const u16 *>(from) : *reinterpret_cast<const u8 *>(from);
}

// Writes 16 bytes of a slab at `offset`, or as many as there are before `end`, to the pages. The width
// divides whatever lies in one piece there.
template <u32 WIDTH>
__device__ __forceinline__ void scatter(const Job &job, u32 token, u32 offset, u32 end, const uint4 &vector) {
    if constexpr (WIDTH == VECTOR) {
        if (offset < end) {
            if (const u64 to = place(job, token, offset)) {
                __stcs(reinterpret_cast<uint4 *>(to), vector);
            }
        }
    } else {
#pragma unroll 1
        for (u32 at = 0; at < VECTOR && offset + at < end; at += job.width) {
            if (const u64 to = place(job, token, offset + at)) {
                put_narrow(to, job.width, half(vector, at) >> (at % 8 * 8));
            }
        }
    }
}

// Reads 16 bytes of a slab out of the pages; zeros from `end` on.
template <u32 WIDTH> __device__ __forceinline__ uint4 gather(const Job &job, u32 token, u32 offset, u32 end) {
    if constexpr (WIDTH == VECTOR) {
        return offset < end ? __ldcs(reinterpret_cast<const uint4 *>(place(job, token, offset)))
                                       : make_uint4(0, 0, 0, 0);
    } else {
        u64 low = 0, high = 0;
#pragma unroll 1
        for (u32 at = 0; at < VECTOR && offset + at < end; at += job.width) {
            const u64 part = get_narrow(place(job, token, offset + at), job.width) << (at % 8 * 8);
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

// Where `bytes` whole bytes, a piece at most, lie in the pages in one run, and are moved whole; else 0. The
// same in every lane. In at most two runs the first byte and the last vector are as far apart as in the
// slab only where the second run follows the first. Only the first token can be one that is left alone.
__device__ __forceinline__ u64 run_of(const Job &job, u32 token, u32 offset, u32 bytes) {
    if (!job.long_runs || offset + bytes > job.slab_bytes) {
        return 0;
    }
    const u64 first = place(job, token, offset);
    return first && place(job, token, offset + bytes - VECTOR) - first == bytes - VECTOR ? first : 0;
}
