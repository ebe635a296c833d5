// What a transformer layer needs besides matrix products, as simple as can be: bf16 in and out.

typedef unsigned long long u64;
typedef unsigned short u16;

__device__ float to_float(u16 bits) { return __uint_as_float(unsigned(bits) << 16); }

__device__ u16 to_bf16(float value) {
    const unsigned bits = __float_as_uint(value);
    return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ float block_sum(float value, float *shared) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0;
    if (threadIdx.x < 32) {
        for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
        if (threadIdx.x == 0) shared[0] = value;
    }
    __syncthreads();
    value = shared[0];
    __syncthreads();
    return value;
}

__device__ float block_max(float value, float *shared) {
    for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[threadIdx.x % 32 < blockDim.x / 32 ? threadIdx.x % 32 : 0];
    for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    __syncthreads();
    return value;
}

// One block a row: out = (in [+ added]) / rms; `in` becomes the sum.
extern "C" __global__ void __launch_bounds__(512) rms_norm(u64 in, u64 added, u64 out, u64 columns) {
    __shared__ float shared[32];
    u16 *row = reinterpret_cast<u16 *>(in) + blockIdx.x * columns;
    const u16 *more = added ? reinterpret_cast<const u16 *>(added) + blockIdx.x * columns : nullptr;
    u16 *target = reinterpret_cast<u16 *>(out) + blockIdx.x * columns;
    float squares = 0;
    for (unsigned i = threadIdx.x; i < columns; i += blockDim.x) {
        const float value = to_float(row[i]) + (more ? to_float(more[i]) : 0);
        row[i] = to_bf16(value);
        squares += value * value;
    }
    const float scale = rsqrtf(block_sum(squares, shared) / float(columns) + 1e-5f);
    for (unsigned i = threadIdx.x; i < columns; i += blockDim.x) target[i] = to_bf16(to_float(row[i]) * scale);
}

// One block a row of gate and up: out = silu(gate) * up.
extern "C" __global__ void __launch_bounds__(512) gate(u64 in, u64 out, u64 columns) {
    const u16 *row = reinterpret_cast<const u16 *>(in) + blockIdx.x * 2 * columns;
    u16 *target = reinterpret_cast<u16 *>(out) + blockIdx.x * columns;
    for (unsigned i = threadIdx.x; i < columns; i += blockDim.x) {
        const float value = to_float(row[i]);
        target[i] = to_bf16(value / (1 + __expf(-value)) * to_float(row[columns + i]));
    }
}

// One block a row of scores, in place, held in registers; `columns` is a multiple of 8 and at most
// 36,864. Row r belongs to query r % queries, which sees all but the last queries - 1 - r % queries
// columns.
extern "C" __global__ void __launch_bounds__(512) softmax(u64 scores, u64 columns, u64 queries) {
    constexpr unsigned HELD = 9;
    __shared__ float shared[32];
    uint4 *row = reinterpret_cast<uint4 *>(scores + u64(blockIdx.x) * columns * 2);
    const unsigned seen = unsigned(columns - (queries - 1 - blockIdx.x % queries));
    const unsigned vectors = unsigned(columns / 8);
    uint4 held[HELD];
    float most = -3e38f;
#pragma unroll
    for (unsigned k = 0; k < HELD; k++) {
        const unsigned i = k * 512 + threadIdx.x;
        if (i < vectors) held[k] = row[i];
    }
#pragma unroll
    for (unsigned k = 0; k < HELD; k++) {
        const unsigned i = k * 512 + threadIdx.x;
        const unsigned words[4] = {held[k].x, held[k].y, held[k].z, held[k].w};
#pragma unroll
        for (unsigned j = 0; j < 8; j++) {
            if (i * 8 + j < seen) most = fmaxf(most, to_float(u16(words[j / 2] >> (j % 2 * 16))));
        }
    }
    most = block_max(most, shared);
    float sum = 0;
#pragma unroll
    for (unsigned k = 0; k < HELD; k++) {
        const unsigned i = k * 512 + threadIdx.x;
        const unsigned words[4] = {held[k].x, held[k].y, held[k].z, held[k].w};
#pragma unroll
        for (unsigned j = 0; j < 8; j++) {
            if (i * 8 + j < seen) sum += __expf(to_float(u16(words[j / 2] >> (j % 2 * 16))) - most);
        }
    }
    const float scale = 1 / block_sum(sum, shared);
#pragma unroll
    for (unsigned k = 0; k < HELD; k++) {
        const unsigned i = k * 512 + threadIdx.x;
        unsigned words[4] = {held[k].x, held[k].y, held[k].z, held[k].w};
#pragma unroll
        for (unsigned j = 0; j < 4; j++) {
            const float low = i * 8 + 2 * j < seen ? __expf(to_float(u16(words[j])) - most) * scale : 0;
            const float high =
                i * 8 + 2 * j + 1 < seen ? __expf(to_float(u16(words[j] >> 16)) - most) * scale : 0;
            words[j] = to_bf16(low) | unsigned(to_bf16(high)) << 16;
        }
        if (i < vectors) row[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// One block a token: K and V of a row of QKV go to their places among contiguous tokens, the queries of
// each KV head's group to [kv head][query head of it][token][dim].
extern "C" __global__ void __launch_bounds__(512)
    split(u64 qkv, u64 keys, u64 values, u64 queries, u64 tokens, u64 first) {
    constexpr unsigned DIM = 128, HEADS = 32, KV_HEADS = 8;
    const u16 *row = reinterpret_cast<const u16 *>(qkv) + blockIdx.x * (HEADS + 2 * KV_HEADS) * DIM;
    for (unsigned i = threadIdx.x; i < HEADS * DIM; i += blockDim.x) {
        const unsigned head = i / DIM;
        reinterpret_cast<u16 *>(queries)[(head * tokens + blockIdx.x) * DIM + i % DIM] = row[i];
    }
    const u64 at = (first + blockIdx.x) * KV_HEADS * DIM;
    for (unsigned i = threadIdx.x; i < KV_HEADS * DIM; i += blockDim.x) {
        reinterpret_cast<u16 *>(keys)[at + i] = row[HEADS * DIM + i];
        reinterpret_cast<u16 *>(values)[at + i] = row[(HEADS + KV_HEADS) * DIM + i];
    }
}

// One block a token: [head][token][dim] to [token][head][dim].
extern "C" __global__ void __launch_bounds__(512) join(u64 in, u64 out, u64 tokens) {
    constexpr unsigned DIM = 128, HEADS = 32;
    for (unsigned i = threadIdx.x; i < HEADS * DIM; i += blockDim.x) {
        reinterpret_cast<u16 *>(out)[blockIdx.x * u64(HEADS * DIM) + i] =
            reinterpret_cast<const u16 *>(in)[(i / DIM * tokens + blockIdx.x) * DIM + i % DIM];
    }
}

// One block a page of one plane: its bytes, from its place in the pages to their place among contiguous
// tokens, or back. `table` names the pages in the order of the prompt.
extern "C" __global__ void __launch_bounds__(512)
    turn_page(u64 pages, u64 table, u64 tokens, u64 page_bytes, u64 back) {
    const u64 page = pages + reinterpret_cast<const unsigned *>(table)[blockIdx.x] * page_bytes;
    const u64 place = tokens + blockIdx.x * page_bytes;
    const uint4 *from = reinterpret_cast<const uint4 *>(back ? place : page);
    uint4 *to = reinterpret_cast<uint4 *>(back ? page : place);
    for (unsigned i = threadIdx.x; i < page_bytes / 16; i += blockDim.x) to[i] = from[i];
}

// Pseudo-random bf16 of about +-scale / 2^16.
extern "C" __global__ void __launch_bounds__(512) fill(u64 out, u64 count, u64 seed, u64 scale) {
    for (u64 i = blockIdx.x * u64(blockDim.x) + threadIdx.x; i < count; i += u64(gridDim.x) * blockDim.x) {
        u64 x = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
        x ^= x >> 31;
        const float value = (float(unsigned(x >> 40)) / 8388608.0f - 1.0f) * float(scale) / 65536.0f;
        reinterpret_cast<u16 *>(out)[i] = to_bf16(value);
    }
}
