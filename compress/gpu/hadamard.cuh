// The orthonormal Walsh-Hadamard transform of a block that lies in one warp's registers; it is its own inverse.
#pragma once
#include "block.cuh"

constexpr float HALF_ROOT = 0.70710678118654752f;

__device__ __forceinline__ void butterfly(float& a, float& b) {
    float sum = __fadd_rn(a, b);
    b = __fsub_rn(a, b);
    a = sum;
}

// `scale` times the transform, over the tiles of a block of `size` elements, a power of two up to 1024 TILES; strides
// grow: neighbours of a lane, lanes, rows, tiles. What lies beyond the block stays 0, if the scale is finite.
template <int TILES>
__device__ __forceinline__ void hadamard(float v[TILES][ROWS][4], int size, int lane, float scale = 1.0f) {
#pragma unroll 1
    for (int tile = 0; tile < TILES && tile * TILE < size; tile++) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float* four = v[tile][row];
            butterfly(four[0], four[1]);
            butterfly(four[2], four[3]);
            butterfly(four[0], four[2]);
            butterfly(four[1], four[3]);
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            if (4 * step >= size) break;
            float sign = lane & step ? -1.0f : 1.0f;  // times this, a number is exact: one rounding, as of a sum
#pragma unroll
            for (int i = 0; i < 4 * ROWS; i++) {
                float mine = v[tile][i / 4][i % 4], other = __shfl_xor_sync(ALL, mine, step);
                v[tile][i / 4][i % 4] = __fmaf_rn(mine, sign, other);
            }
        }
#pragma unroll
        for (int step = 1; step < ROWS; step *= 2) {
            if (128 * step >= size) break;
#pragma unroll
            for (int row = 0; row < ROWS; row++)
                if (!(row & step))
#pragma unroll
                    for (int k = 0; k < 4; k++) butterfly(v[tile][row][k], v[tile][row + step][k]);
        }
    }
#pragma unroll
    for (int step = 1; step < TILES; step *= 2) {
        if (TILE * step >= size) break;
#pragma unroll 1
        for (int tile = 0; tile * TILE < size; tile++)
            if (!(tile & step))
#pragma unroll
                for (int i = 0; i < 4 * ROWS; i++) butterfly(v[tile][i / 4][i % 4], v[tile + step][i / 4][i % 4]);
    }
    int doublings = __popc(size - 1);
    float root = __fdiv_rn(doublings & 1 ? HALF_ROOT : 1.0f, float(1 << (doublings / 2)));
    float factor = __fmul_rn(scale, root);
#pragma unroll 1
    for (int tile = 0; tile < TILES && tile * TILE < size; tile++)
#pragma unroll
        for (int i = 0; i < 4 * ROWS; i++) v[tile][i / 4][i % 4] = __fmul_rn(v[tile][i / 4][i % 4], factor);
}
