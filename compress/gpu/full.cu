// The operators on blocks of 1024 real elements at aligned addresses, each with a scale of its own; kernels named _masked
// are for those of which some element takes no part.
#include "divider.cuh"
#include "full.cuh"

constexpr int BYTES = TILE / 8;  // of signs per block

template <typename T, bool MASKED>
__device__ __forceinline__ void encode_full(
    const Entry* entries, i64 n, float* residual, const u8* mask, u8* out, i64 chunk_blocks, i64 bits_bytes,
    i64 payload_bytes, bool squared) {
    int lane = threadIdx.x & 31;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Entry entry = entries[warp];
        const typename T::raw* x = reinterpret_cast<const typename T::raw*>(entry.address);
        float* r = residual + (i64)entry.block * TILE;
        float c[32], old[32];
        u32 masked = mask_word<MASKED>(mask, entry.block, lane);
#pragma unroll
        for (int row = 0; row < ROWS; row++) load4(T(), x + 128 * row + 4 * lane, c + 4 * row);
#pragma unroll
        for (int row = 0; row < ROWS; row++) load4(f32(), r + 128 * row + 4 * lane, old + 4 * row);
#pragma unroll
        for (int i = 0; i < 32; i++) c[i] = __fadd_rn(c[i], old[i]);
        u32 live = live_of_word<MASKED>(masked, lane);
        if (MASKED) clear_masked(c, live);
        int chunk = entry.block / (int)chunk_blocks;
        int index = entry.block - chunk * (int)chunk_blocks;
        u8* payload = out + chunk * payload_bytes;
        float* scale = reinterpret_cast<float*>(payload + bits_bytes) + index;
        finish<MASKED>(c, r, payload + (i64)index * BYTES, scale, squared, lane, live);
    }
}

#define ENCODE(NAME, T, MASKED)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(                                                  \
        const Entry* entries, i64 n, float* residual, const u8* mask, u8* out, i64 chunk_blocks, i64 bits_bytes, \
        i64 payload_bytes, i64 squared) {                                                                        \
        encode_full<T, MASKED>(                                                                                  \
            entries, n, residual, mask, out, chunk_blocks, bits_bytes, payload_bytes, squared != 0);             \
    }
ENCODE(encode_full_f32, f32, false)
ENCODE(encode_full_bf16, bf16, false)
ENCODE(encode_full_f16, f16, false)
ENCODE(encode_masked_f32, f32, true)
ENCODE(encode_masked_bf16, bf16, true)
ENCODE(encode_masked_f16, f16, true)

// RANKS is how many there are, a power of two; 0: `ranks` tells.
template <int RANKS, bool MASKED>
__device__ __forceinline__ void reduce_encode(
    const u8* payloads, int ranks, const Entry* entries, i64 n, float* residual, const u8* mask, u8* out, i64 chunk_blocks,
    i64 bits_bytes, i64 payload_bytes, bool squared) {
    constexpr int TOGETHER = RANKS == 0 ? 4 : RANKS;  // payloads whose words are loaded before the first is used
    if (RANKS != 0) ranks = RANKS;
    int lane = threadIdx.x & 31;
    i64 warp = warp_index();
    if (warp >= n) return;
    Divider divider(ranks);
    int block = entries[warp].block % (int)chunk_blocks, next = 0;
    for (; warp < n; warp += all_warps(), block = next) {
        if (warp + all_warps() < n) next = entries[warp + all_warps()].block % (int)chunk_blocks;
        float* r = residual + (i64)block * TILE;
        prefetch(r + LINE / 4 * lane);
        float c[32];
        u32 masked = mask_word<MASKED>(mask, block, lane);
        const u32* words = reinterpret_cast<const u32*>(payloads + (i64)block * BYTES) + word_of_lane(lane);
        const float* scales = reinterpret_cast<const float*>(payloads + bits_bytes) + block;
        i64 stride = payload_bytes / 4;
#pragma unroll
        for (int i = 0; i < 32; i++) c[i] = -0.0f;  // adding to it changes nothing, not even the sign of a zero
        for (int first = 0; first < ranks; first += TOGETHER) {
            u32 bits[TOGETHER];
            float scale[TOGETHER];
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                i64 at = min(first + k, ranks - 1) * stride;  // no branch: no load is moved before one
                bits[k] = words[at];
                scale[k] = scales[at];
            }
#pragma unroll
            for (int k = 0; k < TOGETHER; k++)
                if (first + k < ranks) {
                    float share = RANKS == 0 ? divider.share(scale[k]) : __fmul_rn(scale[k], 1.0f / TOGETHER);
                    u32 negative_bits = ~transpose_nibbles(bits[k], lane);
#pragma unroll
                    for (int i = 0; i < 32; i++) c[i] = __fadd_rn(c[i], flipped(share, negative_bits, i));
                }
        }
        float old[32];  // loaded as late as this, it leaves registers for more warps
#pragma unroll
        for (int row = 0; row < ROWS; row++) load4(f32(), r + 128 * row + 4 * lane, old + 4 * row);
#pragma unroll
        for (int i = 0; i < 32; i++) c[i] = __fadd_rn(c[i], old[i]);
        u32 live = live_of_word<MASKED>(masked, lane);
        if (MASKED) clear_masked(c, live);
        float* scale = reinterpret_cast<float*>(out + bits_bytes) + block;
        finish<MASKED>(c, r, out + (i64)block * BYTES, scale, squared, lane, live);
    }
}

#define REDUCE(NAME, RANKS, MASKED)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, RANKS == 0 && !MASKED ? 4 : 3) NAME(                     \
        const u8* payloads, i64 ranks, const Entry* entries, i64 n, float* residual, const u8* mask, u8* out,      \
        i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes, i64 squared) {                                        \
        reduce_encode<RANKS, MASKED>(payloads, (int)ranks, entries, n, residual, mask, out, chunk_blocks,          \
            bits_bytes, payload_bytes, squared != 0);                                                              \
    }
REDUCE(reduce_encode_full, 0, false)
REDUCE(reduce_encode_full_2, 2, false)
REDUCE(reduce_encode_full_4, 4, false)
REDUCE(reduce_encode_full_8, 8, false)
REDUCE(reduce_encode_masked, 0, true)

template <typename T>
__device__ __forceinline__ void decode_full(
    const u8* payloads, const Entry* entries, i64 n, i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes) {
    int lane = threadIdx.x & 31;
    typedef typename T::raw raw;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Entry entry = entries[warp];
        int chunk = entry.block / (int)chunk_blocks;
        int index = entry.block - chunk * (int)chunk_blocks;
        const u8* payload = payloads + chunk * payload_bytes;
        float scale = reinterpret_cast<const float*>(payload + bits_bytes)[index];
        u32 b = reinterpret_cast<const u32*>(payload + (i64)index * BYTES)[word_of_lane(lane)];
        b = transpose_nibbles(b, lane);
        raw up = narrow(T(), scale), down = narrow(T(), negative(scale));
        raw* x = reinterpret_cast<raw*>(entry.address);
#pragma unroll
        for (int row = 0; row < ROWS; row++, b >>= 4)
            store4(x + 128 * row + 4 * lane, b & 1 ? up : down, b & 2 ? up : down, b & 4 ? up : down, b & 8 ? up : down);
    }
}

#define DECODE(T)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) decode_full_##T(                                              \
        const u8* payloads, const Entry* entries, i64 n, i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes) {     \
        decode_full<T>(payloads, entries, n, chunk_blocks, bits_bytes, payload_bytes);                              \
    }
DECODE(f32)
DECODE(bf16)
DECODE(f16)
