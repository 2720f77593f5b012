// The quantizing codecs on blocks of 1024 real elements at aligned addresses that all take part: nearly all blocks. One
// warp per block, straight code over 32 values per lane, so that all loads are under way at once.
#pragma once
#include "hadamard.cuh"
#include "quantized_formats.cuh"
#include "quantized_places.cuh"

template <typename F>
__device__ __forceinline__ void load_codes(const u8* codes, typename F::row rows[ROWS], int lane) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) rows[row] = rows_at<F>(codes)[32 * row + lane];
}

// c <- c + residual, if there is one.
__device__ __forceinline__ void add_residual(float c[ROWS][4], const float* residual, int lane) {
    if (residual == nullptr) return;
    float old[ROWS][4];
#pragma unroll
    for (int row = 0; row < ROWS; row++) load4(f32(), residual + 128 * row + 4 * lane, old[row]);
#pragma unroll
    for (int i = 0; i < 4 * ROWS; i++) c[i / 4][i % 4] = __fadd_rn(c[i / 4][i % 4], old[i / 4][i % 4]);
}

// From c = value + residual: write the scale, the codes, and what they do not say.
template <typename F, bool ROTATE>
__device__ __forceinline__ void finish(
    const float c[ROWS][4], float* residual, u8* codes, float* scale, Rounding rounding, int lane) {
    float v[1][ROWS][4];
#pragma unroll
    for (int i = 0; i < 4 * ROWS; i++) v[0][i / 4][i % 4] = c[i / 4][i % 4];
    if (ROTATE) hadamard<1>(v, TILE, lane);
    u32 most = largest_over_lanes(largest_of(v[0]));
    Steps steps = steps_of<F, ROTATE>(most);
    if (lane == 0) *scale = steps.scale;
    typename F::row rows[ROWS];
    quantize<F>(v[0], rows, steps, most, rounding, 0, lane);
#pragma unroll
    for (int row = 0; row < ROWS; row++) rows_at<F>(codes)[32 * row + lane] = rows[row];
    if (residual == nullptr || is_broken<ROTATE>(most)) return;
    if (ROTATE) hadamard<1>(v, TILE, lane);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        float rest[4];
#pragma unroll
        for (int k = 0; k < 4; k++) rest[k] = __fsub_rn(c[row][k], v[0][row][k]);
        store4(residual + 128 * row + 4 * lane, rest[0], rest[1], rest[2], rest[3]);
    }
}

template <typename F, bool ROTATE, typename T>
__device__ __forceinline__ void encode_full(
    const Entry* entries, i64 n, float* residual, u8* out, const Sizes& sizes, Rounding rounding) {
    int lane = threadIdx.x & 31;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Entry entry = entries[warp];
        const typename T::raw* x = reinterpret_cast<const typename T::raw*>(entry.address);
        float* r = residual == nullptr ? nullptr : residual + (i64)entry.block * TILE;
        float c[ROWS][4];
#pragma unroll
        for (int row = 0; row < ROWS; row++) load4(T(), x + 128 * row + 4 * lane, c[row]);
        add_residual(c, r, lane);
        Place place = place_of(entry.block, sizes);
        u8* payload = out + place.payload;
        u8* codes = payload + place.index * code_bytes<F>(TILE);
        finish<F, ROTATE>(c, r, codes, scales_at(payload, sizes) + place.index, rounding, lane);
    }
}

template <typename F, bool ROTATE>
__device__ __forceinline__ void reduce_encode_full(
    const u8* payloads, i64 ranks, const Entry* entries, i64 n, float* residual, u8* out, const Sizes& sizes,
    Rounding rounding) {
    int lane = threadIdx.x & 31;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        i64 block = entries[warp].block % (int)sizes.chunk_blocks;
        i64 at = block * code_bytes<F>(TILE);
        const float* scales = scales_at(payloads, sizes) + block;
        i64 stride = sizes.payload_bytes / 4;
        float sum[1][ROWS][4];
        typename F::row next[ROWS];
        load_codes<F>(payloads + at, next, lane);
        float next_scale = scales[0];
        for (int rank = 0; rank < (int)ranks; rank++) {
            typename F::row rows[ROWS];
#pragma unroll
            for (int row = 0; row < ROWS; row++) rows[row] = next[row];
            float share = __fdiv_rn(next_scale, float((int)ranks));
            if (rank + 1 < (int)ranks) {
                load_codes<F>(payloads + (rank + 1) * sizes.payload_bytes + at, next, lane);
                next_scale = scales[(rank + 1) * stride];
            }
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                if (rank == 0)
                    values_of<F>(rows[row], share, sum[0][row]);
                else
                    add_values_of<F>(rows[row], share, sum[0][row]);
            }
        }
        if (ROTATE) hadamard<1>(sum, TILE, lane);
        float* r = residual == nullptr ? nullptr : residual + block * TILE;
        add_residual(sum[0], r, lane);  // loaded as late as this, it leaves registers for more warps
        finish<F, ROTATE>(sum[0], r, out + at, scales_at(out, sizes) + block, rounding, lane);
    }
}

// A warp takes two blocks at a time: writing one hides the wait for the next one's codes.
template <typename F, bool ROTATE, typename T>
__device__ __forceinline__ void decode_full(const u8* payloads, const Entry* entries, i64 n, const Sizes& sizes) {
    int lane = threadIdx.x & 31;
    for (i64 first = 2 * warp_index(); first < n; first += 2 * all_warps()) {
        Entry entry[2];
        float scale[2];
        typename F::row rows[2][ROWS];
#pragma unroll
        for (int k = 0; k < 2; k++) entry[k] = entries[min(first + k, n - 1)];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            Place place = place_of(entry[k].block, sizes);
            const u8* payload = payloads + place.payload;
            scale[k] = scales_at(payload, sizes)[place.index];
            load_codes<F>(payload + place.index * code_bytes<F>(TILE), rows[k], lane);
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float v[1][ROWS][4];
#pragma unroll
            for (int row = 0; row < ROWS; row++) values_of<F>(rows[k][row], scale[k], v[0][row]);
            if (ROTATE) hadamard<1>(v, TILE, lane);
            typename T::raw* x = reinterpret_cast<typename T::raw*>(entry[k].address);
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                typename T::raw w[4];
#pragma unroll
                for (int i = 0; i < 4; i++) w[i] = narrow(T(), known(v[0][row][i], scale[k]));
                store4(x + 128 * row + 4 * lane, w[0], w[1], w[2], w[3]);
            }
        }
    }
}
