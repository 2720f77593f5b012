// What a warp does with a block of 1024 real elements at aligned addresses that has a scale of its own: nearly all blocks.
// Straight code over 32 values per lane, so that many warps fit on a multiprocessor and all loads are under way at once.
#pragma once
#include "block.cuh"

__device__ __forceinline__ float sum_of(const float c[32], bool squared, float factor) {
    float sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 32; i++) {
        float v = factor == 1.0f ? c[i] : __fmul_rn(c[i], factor);
        sums[i % 4] = __fadd_rn(sums[i % 4], squared ? __fmul_rn(v, v) : fabsf(v));
    }
    return fold(sums);
}

// From c = value + residual: write the scale, the signs, and c - scale · sign(c). MASKED: where `live` is clear the element
// takes no part, and c is 0.
template <bool MASKED = false>
__device__ __forceinline__ void finish(
    const float c[32], float* residual, u8* words, float* scale, bool squared, int lane, u32 live = ALL) {
    float sum = squared ? sum_of(c, true, 1.0f) : sum_of(c, false, 1.0f);
    int count = TILE;
    float s;
    if (MASKED) {
        count = __popc(live);
#pragma unroll
        for (int step = 16; step >= 1; step >>= 1) count += __shfl_xor_sync(ALL, count, step);
        s = scale_of(sum, 0.0f, count, squared);
    } else {
        s = __fmul_rn(sum, 1.0f / TILE);  // a power of two: the same as dividing
        if (squared) s = __fsqrt_rn(s);
    }
    if (!isfinite(sum)) s = scale_of(sum, sum_of(c, squared, RESCUE), count, squared);
    u32 positive = 0;
    bool keep = s != s;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        float rest[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int i = 4 * row + k;
            bool plus = c[i] >= 0.0f;
            if (plus) positive |= 1u << i;
            rest[k] = __fsub_rn(c[i], plus ? s : -s);
            if (MASKED && !(live >> i & 1)) rest[k] = 0.0f;
        }
        if (!keep) store4(residual + 128 * row + 4 * lane, rest[0], rest[1], rest[2], rest[3]);
    }
    positive = transpose_nibbles(positive & live, lane);
    reinterpret_cast<u32*>(words)[word_of_lane(lane)] = positive;
    if (lane == 0) *scale = s;
}

// c where the bit of `live` is set, else 0.
__device__ __forceinline__ void clear_masked(float c[32], u32 live) {
#pragma unroll
    for (int i = 0; i < 32; i++) c[i] = live >> i & 1 ? c[i] : 0.0f;
}

// The word of a block's mask that `live_of_word` turns into the lane's bits, once it has come.
template <bool MASKED>
__device__ __forceinline__ u32 mask_word(const u8* mask, i64 block, int lane) {
    return MASKED ? reinterpret_cast<const u32*>(mask + block * (TILE / 8))[word_of_lane(lane)] : 0;
}
template <bool MASKED>
__device__ __forceinline__ u32 live_of_word(u32 word, int lane) {
    return MASKED ? ~transpose_nibbles(word, lane) : ALL;
}

// ± scale, the sign bit taken from bit `index`: set is -.
__device__ __forceinline__ float flipped(float scale, u32 negative_bits, int index) {
    return __uint_as_float(__float_as_uint(scale) ^ (negative_bits << (31 - index) & 0x80000000u));
}
