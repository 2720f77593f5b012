// What one warp does with one block: 32 lanes over tiles of 1024 elements, 8 rows of 128; in a row a lane holds 4
// neighbours, so element 128·row + 4·lane + k of a tile is values[row][k] of the lane, bit 4·row + k of its words.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

constexpr int ROWS = 8;
constexpr int TILE = 1024;
constexpr u32 ALL = 0xFFFFFFFFu;
constexpr u32 NAN_BITS = 0x7FC00000u;
constexpr float LARGEST = 3.402823466e38f;
[[maybe_unused]] constexpr float RESCUE = 1.262177448353618888658765704452e-29f;       // 2^-96
constexpr float UNDO_RESCUE = 79228162514264337593543950336.0f;        // 2^96

// One block, as the tables made for a list of tensors name it. Blocks of 1024 real elements at aligned addresses stand in
// a table of their own, for kernels that need look at nothing.
struct __align__(16) Entry {
    i64 address;  // of its first element
    int count;    // of real elements
    int block;    // its number in the layout
};

// Number of this warp among all of the launch.
__device__ __forceinline__ i64 warp_index() { return (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

// Kernels loop, although a launch has a warp for every block: in a loop the compiler starts all loads before the first use.
__device__ __forceinline__ i64 all_warps() { return (i64)gridDim.x * (blockDim.x / 32); }

struct f32 { typedef float raw; };
struct bf16 { typedef u16 raw; };
struct f16 { typedef u16 raw; };

__device__ __forceinline__ float widen(f32, float v) { return v; }
__device__ __forceinline__ float widen(bf16, u16 v) { return __uint_as_float(u32(v) << 16); }
__device__ __forceinline__ float widen(f16, u16 v) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v));
    return wide;
}

__device__ __forceinline__ float narrow(f32, float v) { return v; }
__device__ __forceinline__ u16 narrow(bf16, float v) {  // to nearest, ties to even; NaN stays NaN
    u32 word = __float_as_uint(v);
    if (v != v) return u16((word >> 16) | 0x0040);
    return u16((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}
__device__ __forceinline__ u16 narrow(f16, float v) {
    u16 half;
    if (v != v) return u16((__float_as_uint(v) >> 16 & 0x8000) | 0x7E00);  // the instruction would drop a NaN's sign
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(v));
    return half;
}

__device__ __forceinline__ void load4(f32, const float* p, float* v) {
    float4 four = *reinterpret_cast<const float4*>(p);
    v[0] = four.x; v[1] = four.y; v[2] = four.z; v[3] = four.w;
}
template <typename T>
__device__ __forceinline__ void load4(T type, const u16* p, float* v) {
    ushort4 four = *reinterpret_cast<const ushort4*>(p);
    v[0] = widen(type, four.x); v[1] = widen(type, four.y); v[2] = widen(type, four.z); v[3] = widen(type, four.w);
}
// Plain loads, but stores that the L2 cache may drop first: on an H200 10 % faster than streaming both.
__device__ __forceinline__ void store4(float* p, float a, float b, float c, float d) {
    __stcs(reinterpret_cast<float4*>(p), make_float4(a, b, c, d));
}
__device__ __forceinline__ void store4(u16* p, u16 a, u16 b, u16 c, u16 d) {
    __stcs(reinterpret_cast<ushort4*>(p), make_ushort4(a, b, c, d));
}

// Have a line of 128 bytes brought to the L2 cache: a load that comes later waits less, and no register waits for it.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
constexpr int LINE = 128;

// 8 lanes exchange nibbles: nibble i of lane j becomes nibble j of lane i. Its own inverse. It turns 4 sign bits per row
// and lane into whole words of 32 neighbours: after it, lane l holds word 4·(l % 8) + l / 8 of the tile.
__device__ __forceinline__ u32 transpose_nibbles(u32 word, int lane) {
#pragma unroll
    for (int step = 4; step >= 1; step >>= 1) {
        u32 low = step == 4 ? 0x0000FFFFu : step == 2 ? 0x00FF00FFu : 0x0F0F0F0Fu;
        int shift = 4 * step;
        bool upper = lane & step;
        u32 given = __shfl_xor_sync(ALL, upper ? word & low : (word >> shift) & low, step);
        word = upper ? (word & ~low) | given : (word & low) | (given << shift);
    }
    return word;
}

__device__ __forceinline__ int word_of_lane(int lane) { return 4 * (lane & 7) + (lane >> 3); }

// The words of a tile as a lane needs them: bit 4·row + k is its element k of that row.
__device__ __forceinline__ u32 load_bits(const u8* words, int n_words, int lane) {
    int word = word_of_lane(lane);
    u32 bits = word < n_words ? reinterpret_cast<const u32*>(words)[word] : 0;
    return transpose_nibbles(bits, lane);
}

__device__ __forceinline__ void store_bits(u8* words, int n_words, u32 bits, int lane) {
    bits = transpose_nibbles(bits, lane);
    int word = word_of_lane(lane);
    if (word < n_words) reinterpret_cast<u32*>(words)[word] = bits;
}

// Bit 4·row + k set where the element lies below `count`, counted from the tile's first.
__device__ __forceinline__ u32 real_bits(i64 count, int lane) {
    if (count >= TILE) return ALL;
    u32 bits = 0;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        i64 left = count - 128 * row - 4 * lane;
        bits |= (left >= 4 ? 0xFu : left <= 0 ? 0u : (1u << left) - 1) << (4 * row);
    }
    return bits;
}

// The order in which every implementation adds: fours of neighbours as (0 + 1) + (2 + 3), then lanes by halves.
__device__ __forceinline__ float fold(const float* sums) {
    float total = __fadd_rn(__fadd_rn(sums[0], sums[1]), __fadd_rn(sums[2], sums[3]));
#pragma unroll
    for (int step = 16; step >= 1; step >>= 1) total = __fadd_rn(total, __shfl_xor_sync(ALL, total, step));
    return total;
}

__device__ __forceinline__ float term(float v, bool squared) { return squared ? __fmul_rn(v, v) : fabsf(v); }

__device__ __forceinline__ void add_terms(float sums[4], const float values[ROWS][4], bool squared, float factor) {
#pragma unroll
    for (int row = 0; row < ROWS; row++)
#pragma unroll
        for (int k = 0; k < 4; k++) sums[k] = __fadd_rn(sums[k], term(__fmul_rn(values[row][k], factor), squared));
}

__device__ __forceinline__ float root_if(float mean, bool squared) { return squared ? __fsqrt_rn(mean) : mean; }

// The scale from a sum over `count` elements; `rescued` is the sum of the same values times 2^-96.
__device__ __forceinline__ float scale_of(float sum, float rescued, i64 count, bool squared) {
    if (count == 0) return 0.0f;
    if (isfinite(sum)) return root_if(__fdiv_rn(sum, float(count)), squared);
    if (!isfinite(rescued)) return __uint_as_float(NAN_BITS);
    return fminf(__fmul_rn(root_if(__fdiv_rn(rescued, float(count)), squared), UNDO_RESCUE), LARGEST);
}

__device__ __forceinline__ float negative(float v) { return __uint_as_float(__float_as_uint(v) ^ 0x80000000u); }

// ± scale, the sign bit taken from bit `index` of `bits`: set is +.
__device__ __forceinline__ float signed_scale(float scale, u32 bits, int index) {
    return __uint_as_float(__float_as_uint(scale) ^ ((~(bits >> index) & 1u) << 31));
}

// The values of a tile: 4 at a time where all 4 are real and aligned, else one by one; 0 where `live` is clear.
template <typename T>
__device__ __forceinline__ void load_tile(
    T type, const typename T::raw* x, u32 live, bool whole, int lane, float values[ROWS][4]) {
    if (whole) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) load4(type, x + 128 * row + 4 * lane, values[row]);
        return;
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            values[row][k] = live >> (4 * row + k) & 1 ? widen(type, x[128 * row + 4 * lane + k]) : 0.0f;
}

// Those of 4 neighbours whose bit of `real` is set: as one where `vectors` says that addresses are aligned.
template <typename Raw>
__device__ __forceinline__ void store_real(Raw* x, const Raw values[4], u32 real, bool vectors) {
    if (vectors && real == 0xF) {
        store4(x, values[0], values[1], values[2], values[3]);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (real >> k & 1) x[k] = values[k];
}
