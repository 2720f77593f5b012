// The operators of SignCodec on any block, one warp per block.
#include "any.cuh"

template <typename T>
__device__ __forceinline__ void encode(
    const Entry* entries, i64 n, float* residual, const u8* mask, u8* out, Sums* sums, const Shape& shape) {
    i64 warp = warp_index();
    if (warp >= n) return;
    int lane = threadIdx.x & 31;
    Entry entry = entries[warp];
    i64 block = entry.block;
    const typename T::raw* x = reinterpret_cast<const typename T::raw*>(entry.address);
    bool vectors = vectors_at(x);
    i64 chunk = block / shape.chunk_blocks;
    i64 index = block - chunk * shape.chunk_blocks;
    u8* payload = out + chunk * shape.payload_bytes;
    i64 bytes = shape.block_size / 8;
    encode_block(
        [&](int tile, u32 live, bool whole, float values[ROWS][4]) {
            load_tile(T(), x + tile * TILE, live, whole && vectors, lane, values);
        },
        entry.count,
        residual == nullptr ? nullptr : residual + block * shape.block_size,
        mask == nullptr ? nullptr : mask + block * bytes,
        payload + index * bytes,
        reinterpret_cast<float*>(payload + shape.bits_bytes) + index,
        sums + block,
        shape,
        lane);
}

#define ENCODE(T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) encode_##T(                                               \
        const Entry* entries, i64 n, float* residual, const u8* mask, u8* out, Sums* sums, SHAPE_ARGUMENTS) {   \
        encode<T>(entries, n, residual, mask, out, sums, SHAPE);                                                \
    }
ENCODE(f32)
ENCODE(bf16)
ENCODE(f16)

extern "C" __global__ void __launch_bounds__(256) reduce_encode(
    const u8* payloads, i64 ranks, const Entry* entries, i64 n, float* residual, const u8* mask, u8* out, Sums* sums,
    SHAPE_ARGUMENTS) {
    i64 warp = warp_index();
    if (warp >= n) return;
    int lane = threadIdx.x & 31;
    Entry entry = entries[warp];
    i64 block = entry.block % chunk_blocks;
    i64 bytes = block_size / 8;
    encode_block(
        [&](int tile, u32 live, bool whole, float values[ROWS][4]) {
            int n_words = min((int)block_size - tile * TILE, TILE) / 32;
            for (i64 rank = 0; rank < ranks; rank++) {
                const u8* payload = payloads + rank * payload_bytes;
                u32 bits = load_bits(payload + block * bytes + tile * (TILE / 8), n_words, lane);
                float scale = reinterpret_cast<const float*>(payload + bits_bytes)[block];
                float share = __fdiv_rn(scale, float(ranks));
#pragma unroll
                for (int i = 0; i < 4 * ROWS; i++) {
                    float v = signed_scale(share, bits, i);
                    values[i / 4][i % 4] = rank == 0 ? v : __fadd_rn(values[i / 4][i % 4], v);
                }
            }
        },
        entry.count,
        residual == nullptr ? nullptr : residual + block * block_size,
        mask == nullptr ? nullptr : mask + block * bytes,
        out + block * bytes,
        reinterpret_cast<float*>(out + bits_bytes) + block,
        sums + block,
        SHAPE,
        lane);
}

template <typename T>
__device__ __forceinline__ void decode(
    const u8* payloads, const Entry* entries, i64 n, const u8* mask, i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes,
    i64 block_size) {
    i64 warp = warp_index();
    if (warp >= n) return;
    int lane = threadIdx.x & 31;
    typedef typename T::raw raw;
    Entry entry = entries[warp];
    i64 block = entry.block;
    raw* x = reinterpret_cast<raw*>(entry.address);
    bool vectors = vectors_at(x);
    i64 chunk = block / chunk_blocks;
    i64 index = block - chunk * chunk_blocks;
    i64 bytes = block_size / 8;
    const u8* payload = payloads + chunk * payload_bytes;
    float scale = reinterpret_cast<const float*>(payload + bits_bytes)[index];
    raw up = narrow(T(), scale), down = narrow(T(), negative(scale)), none = narrow(T(), 0.0f);
    for (i64 first = 0; first < entry.count; first += TILE) {
        int n_words = min(block_size - first, (i64)TILE) / 32;
        u32 bits = load_bits(payload + index * bytes + first / 8, n_words, lane);
        u32 real = real_bits(entry.count - first, lane);
        u32 live = mask == nullptr ? ALL : ~load_bits(mask + block * bytes + first / 8, n_words, lane);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            raw v[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int i = 4 * row + k;
                v[k] = live >> i & 1 ? (bits >> i & 1 ? up : down) : none;
            }
            store_real(x + first + 128 * row + 4 * lane, v, real >> (4 * row) & 0xF, vectors);
        }
    }
}

#define DECODE(T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) decode_##T(                                           \
        const u8* payloads, const Entry* entries, i64 n, const u8* mask, i64 chunk_blocks, i64 bits_bytes,  \
        i64 payload_bytes, i64 block_size) {                                                                \
        decode<T>(payloads, entries, n, mask, chunk_blocks, bits_bytes, payload_bytes, block_size);    \
    }
DECODE(f32)
DECODE(bf16)
DECODE(f16)

// One warp per group of blocks that share a scale: blocks[starts[g] .. starts[g + 1]).
extern "C" __global__ void __launch_bounds__(256) shared_scales(
    const Sums* sums, const i64* starts, const i64* blocks, i64 groups, u8* out, SHAPE_ARGUMENTS) {
    i64 group = warp_index();
    if (group >= groups) return;
    int lane = threadIdx.x & 31;
    i64 first = starts[group], n = starts[group + 1] - first;
    float plain[4] = {0, 0, 0, 0}, rescued[4] = {0, 0, 0, 0};
    i64 count = 0;
    for (i64 row = 0; row < n; row += 128)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            i64 at = row + 4 * lane + k;
            if (at < n) {
                Sums s = sums[blocks[first + at]];
                plain[k] = __fadd_rn(plain[k], s.plain);
                rescued[k] = __fadd_rn(rescued[k], s.rescued);
                count += s.count;
            }
        }
#pragma unroll
    for (int step = 16; step >= 1; step >>= 1) count += __shfl_xor_sync(ALL, count, step);
    float scale = scale_of(fold(plain), fold(rescued), count, squared != 0);
    for (i64 at = lane; at < n; at += 32) {
        i64 block = blocks[first + at];
        i64 chunk = block / chunk_blocks;
        u8* payload = out + chunk * payload_bytes;
        reinterpret_cast<float*>(payload + bits_bytes)[block - chunk * chunk_blocks] = scale;
    }
}

template <typename T>
__device__ __forceinline__ void pack(const typename T::raw* x, i64 n, u8* out) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    u32 word = __ballot_sync(ALL, i < n && widen(T(), x[i < n ? i : 0]) >= 0.0f);
    i64 byte = i / 32 * 4 + (i & 3);
    if ((i & 31) < 4 && byte < (n + 7) / 8) out[byte] = u8(word >> (8 * (i & 3)));
}

template <typename T>
__device__ __forceinline__ void unpack(const u8* bits, i64 n, typename T::raw* x) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = narrow(T(), bits[i / 8] >> (i & 7) & 1 ? 1.0f : -1.0f);
}

#define SIGNS(T)                                                                                            \
    extern "C" __global__ void pack_##T(const T::raw* x, i64 n, u8* out) { pack<T>(x, n, out); }            \
    extern "C" __global__ void unpack_##T(const u8* bits, i64 n, T::raw* x) { unpack<T>(bits, n, x); }
SIGNS(f32)
SIGNS(bf16)
SIGNS(f16)
