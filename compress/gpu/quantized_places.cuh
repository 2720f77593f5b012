// Where the codes and the scale of a block lie in payloads of codes of more than one bit.
#pragma once
#include "block.cuh"

struct Sizes {  // of a layout
    i64 chunk_blocks;
    i64 bits_bytes;
    i64 payload_bytes;
};

template <typename F>
__device__ __forceinline__ i64 code_bytes(i64 elements) { return elements * F::BITS / 8; }

// The rows of codes of 4 neighbours; lane l has those of number 32 row + l of a tile.
template <typename F>
__device__ __forceinline__ const typename F::row* rows_at(const u8* codes) {
    return reinterpret_cast<const typename F::row*>(codes);
}
template <typename F>
__device__ __forceinline__ typename F::row* rows_at(u8* codes) { return reinterpret_cast<typename F::row*>(codes); }

__device__ __forceinline__ const float* scales_at(const u8* payload, const Sizes& sizes) {
    return reinterpret_cast<const float*>(payload + sizes.bits_bytes);
}
__device__ __forceinline__ float* scales_at(u8* payload, const Sizes& sizes) {
    return reinterpret_cast<float*>(payload + sizes.bits_bytes);
}

struct Place {
    i64 payload;  // bytes before that of the block's chunk
    int index;    // of the block in it
};

__device__ __forceinline__ Place place_of(int block, const Sizes& sizes) {
    int chunk = block / (int)sizes.chunk_blocks;
    return {chunk * sizes.payload_bytes, block - chunk * (int)sizes.chunk_blocks};
}

// What was said, or the one NaN that all implementations write where the scale is NaN.
__device__ __forceinline__ float known(float said, float scale) {
    return scale != scale ? __uint_as_float(NAN_BITS) : said;
}
