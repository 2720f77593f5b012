// Where the payloads of all chunks hold a block.
#pragma once
#include "block.cuh"

struct Slot {
    i64 words;  // in bytes
    i64 scale;
};

__device__ __forceinline__ Slot slot_of(int block, i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes, i64 block_size) {
    int chunk = block / (int)chunk_blocks;
    i64 index = block - chunk * (int)chunk_blocks;
    i64 payload = chunk * payload_bytes;
    return {payload + index * (block_size / 8), payload + bits_bytes + 4 * index};
}

__device__ __forceinline__ const u32* words_at(const u8* payloads, Slot slot) {
    return reinterpret_cast<const u32*>(payloads + slot.words);
}
__device__ __forceinline__ float* scale_at(const u8* payloads, Slot slot) {
    return reinterpret_cast<float*>(const_cast<u8*>(payloads) + slot.scale);
}
