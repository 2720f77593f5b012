// The quantizing codecs on blocks of 1024 real elements at aligned addresses that all take part: nearly all blocks. One
// warp per block, straight code over 32 values per lane, so that all loads are under way at once.
#pragma once
#include "divider.cuh"
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

// residual <- c - v
__device__ __forceinline__ void store_rest(
    const float c[ROWS][4], const float v[ROWS][4], float* residual, int lane) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        float rest[4];
#pragma unroll
        for (int k = 0; k < 4; k++) rest[k] = __fsub_rn(c[row][k], v[row][k]);
        store4(residual + 128 * row + 4 * lane, rest[0], rest[1], rest[2], rest[3]);
    }
}

// From c = value + residual: write the scale, the codes, and what they do not say. That is worked out from the codes, if
// there is a residual: numbers kept for it would leave registers for half the warps.
template <typename F, bool ROTATE>
__device__ __forceinline__ void finish(
    const float c[ROWS][4], float* residual, u8* codes, float* scale, Rounding rounding, int lane) {
    float v[1][ROWS][4];
#pragma unroll
    for (int i = 0; i < 4 * ROWS; i++) v[0][i / 4][i % 4] = c[i / 4][i % 4];
    if (ROTATE) hadamard<1>(v, TILE, lane);
    u32 most = __reduce_max_sync(ALL, largest_of(v[0]));
    Steps steps = steps_of<F, ROTATE>(most);
    if (lane == 0) *scale = steps.scale;
    typename F::row rows[ROWS];
    quantize<F>(v[0], rows, steps, most, rounding, 0, lane);
#pragma unroll
    for (int row = 0; row < ROWS; row++) rows_at<F>(codes)[32 * row + lane] = rows[row];
    if (residual == nullptr || is_broken<ROTATE>(most)) return;
#pragma unroll
    for (int row = 0; row < ROWS; row++) values_of<F>(rows[row], ROTATE ? 1.0f : steps.scale, v[0][row]);
    if (ROTATE) hadamard<1>(v, TILE, lane, steps.scale);
    store_rest(c, v[0], residual, lane);
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
    Divider divider((int)ranks);
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        i64 block = entries[warp].block % (int)sizes.chunk_blocks;
        i64 at = block * code_bytes<F>(TILE);
        const float* scales = scales_at(payloads, sizes) + block;
        i64 stride = sizes.payload_bytes / 4;
        auto load = [&](int rank, typename F::row rows[ROWS], float& scale) {
            load_codes<F>(payloads + rank * sizes.payload_bytes + at, rows, lane);
            scale = scales[rank * stride];
        };
        float* r = residual == nullptr ? nullptr : residual + block * TILE;
        // Where few codes come before it; on an H200, beside the codes of more ranks, it takes longer.
        if (r != nullptr && (int)ranks * F::BITS <= 16) prefetch(r + LINE / 4 * lane);
        float sum[1][ROWS][4], scale, next_scale;
        typename F::row rows[ROWS], next[ROWS];
        auto add = [&](const typename F::row rows[ROWS], float scale) {
            float share = divider.share(scale);
#pragma unroll
            for (int row = 0; row < ROWS; row++) add_values_of<F>(rows[row], share, sum[0][row]);
        };
        load(0, rows, scale);
        if ((int)ranks > 1) load(1, next, next_scale);
        float share = divider.share(scale);
#pragma unroll
        for (int row = 0; row < ROWS; row++) values_of<F>(rows[row], share, sum[0][row]);
        for (int rank = 2; rank < (int)ranks; rank++) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) rows[row] = next[row];
            scale = next_scale;
            load(rank, next, next_scale);  // while the last one's are added
            add(rows, scale);
        }
        if ((int)ranks > 1) add(next, next_scale);
        if (ROTATE) hadamard<1>(sum, TILE, lane);
        add_residual(sum[0], r, lane);  // loaded as late as this, it leaves registers for more warps
        finish<F, ROTATE>(sum[0], r, out + at, scales_at(out, sizes) + block, rounding, lane);
    }
}

// Four numbers at `x`, or NaNs if the scale is NaN. Chosen and not branched on: the loads of both blocks would wait for
// the scale.
__device__ __forceinline__ void store_known(f32, float* x, const float v[4], float scale) {
    store4(x, known(v[0], scale), known(v[1], scale), known(v[2], scale), known(v[3], scale));
}
__device__ __forceinline__ void store_words(u16* x, u32 low, u32 high, u32 nans, float scale) {
    bool told = scale == scale;
    __stcs(reinterpret_cast<int2*>(x), int2{int(told ? low : nans), int(told ? high : nans)});
}
__device__ __forceinline__ void store_known(bf16, u16* x, const float v[4], float scale) {
    u32 low, high;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(v[1]), "f"(v[0]));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(v[3]), "f"(v[2]));
    store_words(x, low, high, 0x7FC07FC0u, scale);
}
__device__ __forceinline__ void store_known(f16, u16* x, const float v[4], float scale) {
    u32 low, high;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(v[1]), "f"(v[0]));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(v[3]), "f"(v[2]));
    store_words(x, low, high, 0x7E007E00u, scale);
}

// A warp takes two blocks at a time: writing one hides the wait for the next one's codes.
template <typename F, typename T>
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
            typename T::raw* x = reinterpret_cast<typename T::raw*>(entry[k].address);
            float v[ROWS][4];
#pragma unroll
            for (int row = 0; row < ROWS; row++) values_of<F>(rows[k][row], scale[k], v[row]);
#pragma unroll
            for (int row = 0; row < ROWS; row++) store_known(T(), x + 128 * row + 4 * lane, v[row], scale[k]);
        }
    }
}
