// A few rows of a whole block at a time, so that registers are left for many warps.
#pragma once
#include "places.cuh"

constexpr int ROWS_AT_ONCE = 2;  // of 128 elements
constexpr int N = 4 * ROWS_AT_ONCE;

template <typename T>
__device__ __forceinline__ void load_rows(const typename T::raw* x, float values[N]) {
#pragma unroll
    for (int row = 0; row < ROWS_AT_ONCE; row++) load4(T(), x + 128 * row, values + 4 * row);
}

template <typename T>
__device__ __forceinline__ void store_rows(typename T::raw* x, const float v[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
        store4(x + 32 * i, narrow(T(), v[i]), narrow(T(), v[i + 1]), narrow(T(), v[i + 2]), narrow(T(), v[i + 3]));
}

// Where a lane's elements of the first row are.
template <typename T>
__device__ __forceinline__ typename T::raw* lane_of(const i64* table, Place place, int lane) {
    return const_cast<typename T::raw*>(elements_of<T>(table, place)) + 4 * lane;
}
