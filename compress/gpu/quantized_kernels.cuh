// The kernels of one quantizing codec, QUANTIZED_KERNELS(format, rotated): those named _full are for blocks of 1024 real
// elements at aligned addresses that all take part.
#pragma once
#include "quantized_any.cuh"
#include "quantized_full.cuh"
#include "quantized_rotated.cuh"

template <int TILES>
struct Held {
    static constexpr int AT_ONCE = TILES;
};

// Calls `visit` with the number of tiles of a block that are held at once: all of one that is rotated.
template <bool ROTATE, typename Visit>
__device__ __forceinline__ void hold(i64 block_size, Visit visit) {
    if constexpr (ROTATE) {
        if (block_size > TILE) {
            visit(Held<4>());
            return;
        }
    }
    visit(Held<1>());
}

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
// So many thread blocks are to fit on a multiprocessor: as many as leave the registers that a block of numbers needs.
#define KERNEL_OF(THREAD_BLOCKS) extern "C" __global__ void __launch_bounds__(THREADS, THREAD_BLOCKS)
#define SIZES_ARGUMENTS i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes
#define SIZES Sizes{chunk_blocks, bits_bytes, payload_bytes}
#define ROUNDING_ARGUMENTS i64 stochastic, i64 seed
#define ROUNDING Rounding{stochastic != 0, u32(seed)}
#define BY_HELD(F, ROTATE, CALL) \
    hold<ROTATE>(block_size, [&](auto held) { constexpr int TILES = decltype(held)::AT_ONCE; CALL; })

#define TENSOR_KERNELS(F, ROTATE, T)                                                                             \
    KERNEL_OF(ROTATE ? 2 : 4) encode_full_##T(                                                                   \
        const Entry* entries, i64 n, float* residual, u8* out, SIZES_ARGUMENTS, ROUNDING_ARGUMENTS) {            \
        encode_full<F, ROTATE, T>(entries, n, residual, out, SIZES, ROUNDING);                                   \
    }                                                                                                            \
    KERNEL encode_##T(                                                                                           \
        const Entry* entries, i64 n, float* residual, const u8* mask, u8* out, SIZES_ARGUMENTS, i64 block_size,  \
        ROUNDING_ARGUMENTS) {                                                                                    \
        BY_HELD(F, ROTATE, (encode_any<F, ROTATE, TILES, T>(                                                     \
            entries, n, residual, mask, out, SIZES, (int)block_size, ROUNDING)));                                \
    }                                                                                                            \
    KERNEL_OF(4) decode_full_##T(                                                                                \
        const u8* payloads, const Entry* entries, i64 n, SIZES_ARGUMENTS) {                                      \
        if constexpr (ROTATE)                                                                                    \
            decode_rotated<F, T>(payloads, entries, n, SIZES);                                                   \
        else                                                                                                     \
            decode_full<F, T>(payloads, entries, n, SIZES);                                                      \
    }                                                                                                            \
    KERNEL decode_##T(                                                                                           \
        const u8* payloads, const Entry* entries, i64 n, const u8* mask, SIZES_ARGUMENTS, i64 block_size) {      \
        BY_HELD(F, ROTATE, (decode_any<F, ROTATE, TILES, T>(payloads, entries, n, mask, SIZES, (int)block_size))); \
    }

#define QUANTIZED_KERNELS(F, ROTATE)                                                                             \
    TENSOR_KERNELS(F, ROTATE, f32)                                                                               \
    TENSOR_KERNELS(F, ROTATE, bf16)                                                                              \
    TENSOR_KERNELS(F, ROTATE, f16)                                                                               \
    KERNEL_OF(ROTATE ? 2 : 3) reduce_encode_full(                                                                \
        const u8* payloads, i64 ranks, const Entry* entries, i64 n, float* residual, u8* out, SIZES_ARGUMENTS,   \
        ROUNDING_ARGUMENTS) {                                                                                    \
        reduce_encode_full<F, ROTATE>(payloads, ranks, entries, n, residual, out, SIZES, ROUNDING);              \
    }                                                                                                            \
    KERNEL reduce_encode(                                                                                        \
        const u8* payloads, i64 ranks, const Entry* entries, i64 n, float* residual, const u8* mask, u8* out,    \
        SIZES_ARGUMENTS, i64 block_size, ROUNDING_ARGUMENTS) {                                                   \
        BY_HELD(F, ROTATE, (reduce_encode_any<F, ROTATE, TILES>(                                                 \
            payloads, ranks, entries, n, residual, mask, out, SIZES, (int)block_size, ROUNDING)));               \
    }                                                                                                            \
    KERNEL undo_reduce(                                                                                          \
        const u8* payloads, i64 ranks, const Entry* entries, i64 n, float* residual, const u8* mask,             \
        const u8* sent, const u8* keep, SIZES_ARGUMENTS, i64 block_size) {                                       \
        if (keep != nullptr && *keep) return;                                                                    \
        BY_HELD(F, ROTATE, (undo_reduce_any<F, ROTATE, TILES>(                                                   \
            payloads, ranks, entries, n, residual, mask, sent, SIZES, (int)block_size)));                        \
    }
