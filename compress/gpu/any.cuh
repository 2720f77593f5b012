// What a warp does with a block of any size and fill, at any address, masked or not, with a scale of its own or shared.
// Bytes agree with onebit.compress.reference: see fold() for the order of sums; multiplications and additions are rounded
// one by one, never contracted.
#pragma once
#include "block.cuh"

enum Stage { FUSED = 0, SUMS_ONLY = 1, GIVEN_SCALES = 2 };  // a scale shared by many blocks takes two visits

struct Sums {  // per block, when a scale is shared
    float plain;
    float rescued;
    i64 count;
};

struct Shape {
    i64 chunk_blocks;
    i64 bits_bytes;
    i64 payload_bytes;
    int block_size;
    bool squared;
    int stage;
};

__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<i64>(p) & 15) == 0; }
__device__ __forceinline__ bool aligned8(const void* p) { return (reinterpret_cast<i64>(p) & 7) == 0; }
__device__ __forceinline__ bool vectors_at(const float* p) { return aligned16(p); }
__device__ __forceinline__ bool vectors_at(const u16* p) { return aligned8(p); }

// c = value + residual on the live elements, else 0.
__device__ __forceinline__ void add_residual(
    float values[ROWS][4], const float* residual, u32 live, bool whole, int lane) {
    if (residual == nullptr) {
        if (live != ALL)
#pragma unroll
            for (int i = 0; i < 4 * ROWS; i++) values[i / 4][i % 4] = live >> i & 1 ? values[i / 4][i % 4] : 0.0f;
        return;
    }
    float old[ROWS][4];
    load_tile(f32(), residual, live, whole, lane, old);
#pragma unroll
    for (int i = 0; i < 4 * ROWS; i++) {
        float c = __fadd_rn(values[i / 4][i % 4], old[i / 4][i % 4]);
        values[i / 4][i % 4] = live >> i & 1 ? c : 0.0f;
    }
}

// Signs of a tile, and the new residual unless there is none or the scale is NaN.
__device__ __forceinline__ void quantize_tile(
    const float values[ROWS][4], float* residual, float scale, u32 real, u32 live, u8* words, int n_words, int lane) {
    u32 positive = 0;
#pragma unroll
    for (int i = 0; i < 4 * ROWS; i++) positive |= u32(values[i / 4][i % 4] >= 0.0f) << i;
    positive &= live;
    store_bits(words, n_words, positive, lane);
    if (residual == nullptr || scale != scale) return;
    bool vectors = aligned16(residual);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        float rest[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int i = 4 * row + k;
            rest[k] = live >> i & 1 ? __fsub_rn(values[row][k], signed_scale(scale, positive, i)) : 0.0f;
        }
        store_real(residual + 128 * row + 4 * lane, rest, real >> (4 * row) & 0xF, vectors);
    }
}

// Everything but where the values come from. `fill(tile, live, whole, values)` gives a tile's values before the residual.
template <typename Fill>
__device__ __forceinline__ void encode_block(
    Fill fill, i64 count, float* residual, const u8* mask, u8* words, float* scale, Sums* sums, const Shape& shape, int lane) {
    int tiles = (shape.block_size + TILE - 1) / TILE;
    bool vectors = residual == nullptr || aligned16(residual);
    float values[ROWS][4];
    float plain[4] = {0, 0, 0, 0}, rescued[4] = {0, 0, 0, 0};
    i64 live_count = 0;
    u32 real = 0, live = 0;

    auto tile_values = [&](int tile) {
        int n_words = min(shape.block_size - tile * TILE, TILE) / 32;
        real = real_bits(min(count, (i64)shape.block_size) - (i64)tile * TILE, lane);
        live = mask == nullptr ? real : real & ~load_bits(mask + tile * (TILE / 8), n_words, lane);
        bool whole = count >= (i64)(tile + 1) * TILE && vectors;
        fill(tile, live, whole, values);
        add_residual(values, residual == nullptr ? nullptr : residual + tile * TILE, live, whole, lane);
    };

    for (int tile = 0; tile < tiles; tile++) {
        tile_values(tile);
        if (shape.stage != GIVEN_SCALES) add_terms(plain, values, shape.squared, 1.0f);
        if (shape.stage == SUMS_ONLY) add_terms(rescued, values, shape.squared, RESCUE);
        live_count += __popc(live);
    }
    float s;
    if (shape.stage == GIVEN_SCALES) {
        s = *scale;
    } else {
        if (mask == nullptr) {
            live_count = count;
        } else {
#pragma unroll
            for (int step = 16; step >= 1; step >>= 1) live_count += __shfl_xor_sync(ALL, live_count, step);
        }
        float sum = fold(plain);
        float large = 0.0f;
        if (shape.stage == SUMS_ONLY) {
            large = fold(rescued);
        } else if (!isfinite(sum)) {
            for (int tile = 0; tile < tiles; tile++) {
                if (tiles > 1) tile_values(tile);
                add_terms(rescued, values, shape.squared, RESCUE);
            }
            large = fold(rescued);
        }
        if (shape.stage == SUMS_ONLY) {
            if (lane == 0) *sums = {sum, large, live_count};
            return;
        }
        s = scale_of(sum, large, live_count, shape.squared);
        if (lane == 0) *scale = s;
    }
    for (int tile = 0; tile < tiles; tile++) {
        if (tiles > 1) tile_values(tile);
        int n_words = min(shape.block_size - tile * TILE, TILE) / 32;
        float* r = residual == nullptr ? nullptr : residual + tile * TILE;
        quantize_tile(values, r, s, real, live, words + tile * (TILE / 8), n_words, lane);
    }
}

#define SHAPE_ARGUMENTS i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes, i64 block_size, i64 squared, i64 stage
#define SHAPE Shape{chunk_blocks, bits_bytes, payload_bytes, int(block_size), squared != 0, int(stage)}
