// How the kernels of a step find blocks and tensors: places name blocks, tables of pointers the tensors.
#pragma once
#include "any.cuh"

// One block, as the tables made for a layout name it; tensor < 0: it is padding.
struct __align__(16) Place {
    i64 offset;  // of its first element in its tensor
    int tensor;
    int block;
};

// A number that was passed as the bits of a double.
__device__ __forceinline__ float number(i64 bits) { return float(__longlong_as_double(bits)); }

__device__ __forceinline__ float sum_of_two(float beta1_m, float alpha, float g) {
    return __fadd_rn(beta1_m, __fmul_rn(alpha, g));
}

enum Type { F32 = 0, BF16 = 1, F16 = 2 };

__device__ float4 ZEROS[TILE / 4];  // in place of a gradient that is not there

template <typename T>
__device__ __forceinline__ const typename T::raw* elements_of(const i64* table, Place place) {
    typedef const typename T::raw* pointer;
    i64 base = table[place.tensor];
    return base == 0 ? reinterpret_cast<pointer>(ZEROS) : reinterpret_cast<pointer>(base) + place.offset;
}

template <typename T>
__device__ __forceinline__ void load_full(const typename T::raw* x, int lane, float values[32]) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) load4(T(), x + 128 * row + 4 * lane, values + 4 * row);
}

// A tile of a tensor of any type, 0 where `live` is clear and where there is no tensor.
__device__ __forceinline__ void load_any(
    Type type, i64 base, i64 first, u32 live, bool whole, int lane, float values[ROWS][4]) {
    if (base == 0) live = 0;
    if (type == F32) {
        const float* x = reinterpret_cast<const float*>(base) + first;
        load_tile(f32(), x, live, whole && base != 0 && vectors_at(x), lane, values);
        return;
    }
    const u16* x = reinterpret_cast<const u16*>(base) + first;
    bool vectors = whole && base != 0 && vectors_at(x);
    if (type == BF16) load_tile(bf16(), x, live, vectors, lane, values);
    else load_tile(f16(), x, live, vectors, lane, values);
}

template <typename T>
__device__ __forceinline__ void store_tile(T type, typename T::raw* x, u32 real, int lane, const float values[ROWS][4]) {
    bool vectors = vectors_at(x);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        typename T::raw* target = x + 128 * row + 4 * lane;
        typename T::raw v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) v[k] = narrow(type, values[row][k]);
        u32 nibble = real >> (4 * row) & 0xF;
        if (vectors && nibble == 0xF) {
            store4(target, v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (nibble >> k & 1) target[k] = v[k];
        }
    }
}

__device__ __forceinline__ void store_any(Type type, i64 base, i64 first, u32 real, int lane, const float values[ROWS][4]) {
    if (type == F32) store_tile(f32(), reinterpret_cast<float*>(base) + first, real, lane, values);
    else if (type == BF16) store_tile(bf16(), reinterpret_cast<u16*>(base) + first, real, lane, values);
    else store_tile(f16(), reinterpret_cast<u16*>(base) + first, real, lane, values);
}

__device__ __forceinline__ i64 count_of(Place place, const i64* numels, i64 block_size) {
    return place.tensor < 0 ? 0 : min(numels[place.tensor] - place.offset, block_size);
}

__device__ __forceinline__ i64 address_of(const i64* table, Place place) {
    return table == nullptr || place.tensor < 0 ? 0 : table[place.tensor];
}
