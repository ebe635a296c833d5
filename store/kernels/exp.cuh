// Codec `exp` (docs/format.md): what the kernels that decode and encode share. The structs are mirrored in
// src/device/cuda/exp.rs.

#pragma once

#include "slab.cuh"


constexpr u32 TILE_VALUES = 1024;
constexpr u32 TILE_BYTES = 2 * TILE_VALUES;
constexpr u32 HEADER_BYTES = 128;
// Values of a group, and groups of a whole tile.
constexpr u32 GROUP_VALUES = 32;
constexpr u32 TILE_GROUPS = TILE_VALUES / GROUP_VALUES;
constexpr u32 QUARTERS = 4;
constexpr u32 BLOCK_WARPS = 16;
// Slabs start on multiples of this in their slots.
constexpr u32 ALIGN = 256;

// The checksum's keys for a piece.
struct Keys {
    u64 of[PIECE / 8];

    __device__ constexpr Keys() : of() {
        for (u32 index = 0; index < PIECE / 8; index++) {
            u64 x = 0x7374656d6b762d30ull + (index + 1) * 0x9e3779b97f4a7c15ull;
            x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
            x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
            of[index] = x ^ (x >> 31);
        }
    }
};

__device__ constexpr Keys KEYS;

struct CodedPlane {
    // Where it is in the raw slab.
    u32 start;
    u32 end;
    u32 groups;
    // Groups and tiles of the planes before it.
    u32 first_group;
    u32 first_tile;
    u32 unused;
};

// What a warp knows of its tile.
struct Tile {
    u32 plane;
    // Where it is in the raw slab, and where its plane ends.
    u32 start;
    u32 end;
    u32 groups;
    u32 group_in_plane;
};

__device__ __forceinline__ Tile tile_of(const CodedPlane (&planes)[PLANES_MAX], u32 count, u32 number) {
    u32 index = 0;
#pragma unroll
    for (u32 next = 1; next < PLANES_MAX; next++) {
        index += next < count && number >= planes[next].first_tile;
    }
    const CodedPlane &plane = planes[index];
    const u32 in_plane = number - plane.first_tile;
    const u32 group = in_plane * TILE_GROUPS;
    return {index, plane.start + in_plane * TILE_BYTES, plane.end, min(TILE_GROUPS, plane.groups - group), group};
}

// Where a whole tile lies in the pages in one run, and is moved whole; else 0: see `run_of`. Whole warps.
__device__ __forceinline__ u64 run_of_tile(const Job &job, u32 token, const Tile &tile, u32 lane) {
    if (!job.long_runs || tile.groups < TILE_GROUPS || tile.start + TILE_BYTES > tile.end) {
        return 0;
    }
    const u64 own = place(job, token, tile.start + lane % 2 * (TILE_BYTES - VECTOR));
    const u64 first = __shfl_sync(~0u, own, 0), last = __shfl_sync(~0u, own, 1);
    return first && last - first == TILE_BYTES - VECTOR ? first : 0;
}

// Eight values from `offset` on one by one, or as many as there are before `end`; zeros behind them.
__device__ __forceinline__ uint4 read_one_by_one(u64 slab, u32 offset, u32 end) {
    u64 low = 0, high = 0;
#pragma unroll 1
    for (u32 at = 0; at < VECTOR && offset + at < end; at += 2) {
        const u64 value = u64(*reinterpret_cast<const u16 *>(slab + offset + at)) << (at % 8 * 8);
        (at < 8 ? low : high) |= value;
    }
    return make_uint4(u32(low), u32(low >> 32), u32(high), u32(high >> 32));
}

// The top bit of each nibble that is an escape.
template <u32 BITS> __device__ __forceinline__ u32 escapes_in(u32 codes) {
    if constexpr (BITS == 3) {
        return ((codes & 0x77777777u) + 0x11111111u) & 0x88888888u;
    } else {
        return codes & codes << 1 & codes << 2 & codes << 3 & 0x88888888u;
    }
}

// The codes of the fourth quarter, whose bits are the top ones of the others' where codes have three.
__device__ __forceinline__ u32 fourth_word(const u32 (&words)[QUARTERS]) {
    return (words[0] >> 3 & 0x11111111u) | (words[1] >> 2 & 0x22222222u) | (words[2] >> 1 & 0x44444444u);
}

__device__ __forceinline__ u32 escapes_of(u32 bits, u32 codes) {
    return bits == 3 ? escapes_in<3>(codes) : escapes_in<4>(codes);
}

// How many there are in a lane's words: of each quarter one byte.
template <u32 BITS> __device__ __forceinline__ u32 count_escapes(const u32 (&words)[QUARTERS]) {
    u32 all = 0;
#pragma unroll
    for (u32 quarter = 0; quarter < QUARTERS; quarter++) {
        all |= u32(__popc(escapes_in<BITS>(words[quarter]))) << (8 * quarter);
    }
    return all;
}

// How many escapes of a tile come before a lane's `own`: of each quarter one byte each, since there are at most 8 in
// a lane and 248 in those before one.
struct Ranks {
    u32 before;
    // Before the last lane's, and its own.
    u32 last;
    u32 rest;

    // Whole warps.
    __device__ __forceinline__ Ranks(u32 own, u32 lane) {
        before = __shfl_up_sync(~0u, own, 1);
        before = lane == 0 ? 0 : before;
#pragma unroll
        for (u32 step = 1; step < WARP; step *= 2) {
            const u32 other = __shfl_up_sync(~0u, before, step);
            before += lane >= step ? other : 0;
        }
        last = __shfl_sync(~0u, before, WARP - 1);
        rest = __shfl_sync(~0u, own, WARP - 1);
    }

    // In the lanes before this one, and in all.
    __device__ __forceinline__ u32 before_lane(u32 quarter) const { return before >> (8 * quarter) & 0xff; }
    __device__ __forceinline__ u32 of_quarter(u32 quarter) const {
        return (last >> (8 * quarter) & 0xff) + (rest >> (8 * quarter) & 0xff);
    }
};

// The sum of a piece of a slab's stored bytes, in every lane; of those that it still has.
__device__ __forceinline__ u64 sum_piece(u64 slab, u32 piece, u32 stored, u32 lane) {
    uint4 vectors[TURNS];
#pragma unroll
    for (u32 turn = 0; turn < TURNS; turn++) {
        vectors[turn] = read_slab(slab, piece * PIECE + (turn * WARP + lane) * VECTOR, stored);
    }
    Sum sum = {0, 0};
#pragma unroll
    for (u32 turn = 0; turn < TURNS; turn++) {
        const u32 at = 2 * (turn * WARP + lane);
        sum.add(word(vectors[turn].x, vectors[turn].y), KEYS.of[at]);
        sum.add(word(vectors[turn].z, vectors[turn].w), KEYS.of[at + 1]);
    }
    return sum.of_warp(piece);
}
