// What a code of each format is worth, how a number is rounded to one, and the steps that a block's largest number asks
// for. Every operation is rounded by itself, as onebit.compress.quantized_reference says.
#pragma once
#include "block.cuh"

constexpr float SMALLEST = 7.88860905221e-31f;  // 2^-100: a block of less is all zeros

// Whether a block with this largest magnitude, as bits, counts as not finite: 2^127, or 2^115 where it is rotated.
template <bool ROTATE>
__device__ __forceinline__ bool is_broken(u32 most) {
    return most >= (ROTATE ? 0x79000000u : 0x7F000000u);
}

struct Rounding {
    bool stochastic;
    u32 seed;
};

// Two's complement integers, +-(2^(bits - 1) - 1) at most.
template <int BITS_, typename ROW>
struct Integers {
    typedef ROW row;  // the codes of 4 neighbours
    static constexpr int BITS = BITS_;
    static constexpr bool DITHERS = true;
    static constexpr float MOST = float((1 << (BITS - 1)) - 1);
    static __device__ __forceinline__ u32 code(float whole) { return u32(int(whole)) & ((1u << BITS) - 1); }
    static __device__ __forceinline__ u32 nearest(float y) { return code(rintf(y)); }
    static __device__ __forceinline__ u32 dithered(float y, float dither) {
        float below = floorf(y);
        return code(dither < __fsub_rn(y, below) ? __fadd_rn(below, 1.0f) : below);
    }
    static __device__ __forceinline__ float value(u32 code) {
        return float(int(code << (32 - BITS)) >> (32 - BITS));
    }
};
typedef Integers<8, u32> Int8;
typedef Integers<4, u16> Int4;

// e4m3: sign, 4 bits of exponent, 3 of fraction; 448 at most, in steps of 2^-9 below 2^-6.
struct Fp8 {
    typedef u32 row;
    static constexpr int BITS = 8;
    static constexpr bool DITHERS = false;
    static constexpr float MOST = 448.0f;
    static __device__ __forceinline__ u32 nearest(float y) {
        u32 word = __float_as_uint(y), size = word & 0x7FFFFFFFu;
        u32 normal = ((size + 0x7FFFFu + (size >> 20 & 1)) >> 20) - (120 << 3);
        // The steps of fp32 from 2^14 on are 2^-9: the addition rounds.
        u32 subnormal = __float_as_uint(__fadd_rn(__uint_as_float(size), 16384.0f)) - 0x46800000u;
        return (size < 0x3C800000u ? subnormal : normal) | (word >> 24 & 0x80u);
    }
    static __device__ __forceinline__ float value(u32 code) {
        u32 word = (code & 0x7Fu) << 20 | (code & 0x80u) << 24;
        return __fmul_rn(__uint_as_float(word), 1.32922799578491587e36f);  // 2^120, the difference of the exponents
    }
};

struct Steps {
    float scale;
    float inverse;  // 0 where all codes are 0
};

// `most`: the bits of the largest magnitude of a block.
template <typename F, bool ROTATE>
__device__ __forceinline__ Steps steps_of(u32 most) {
    float largest = __uint_as_float(most);
    if (is_broken<ROTATE>(most)) return {__uint_as_float(NAN_BITS), 0.0f};
    if (largest < SMALLEST) return {0.0f, 0.0f};
    return {__fdiv_rn(largest, F::MOST), __fdiv_rn(F::MOST, largest)};
}

__device__ __forceinline__ u32 mix(u32 h) {
    h = (h ^ h >> 16) * 0x7FEB352Du;
    h = (h ^ h >> 15) * 0x846CA68Bu;
    return h ^ h >> 16;
}

// From 0 up to 1, drawn from the number itself, its place in the block and what all of the block share.
__device__ __forceinline__ float dither_of(float v, u32 shared, int place) {
    u32 drawn = mix(__float_as_uint(v) ^ (shared + u32(place) * 0x9E3779B9u));
    return __fmul_rn(float(int(drawn >> 8)), 5.9604644775390625e-8f);  // 2^-24
}

__device__ __forceinline__ u32 largest_of(const float v[ROWS][4]) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 4 * ROWS; i++) most = max(most, __float_as_uint(v[i / 4][i % 4]) & 0x7FFFFFFFu);
    return most;
}

__device__ __forceinline__ u32 largest_over_lanes(u32 most) {
#pragma unroll
    for (int step = 16; step >= 1; step >>= 1) most = max(most, __shfl_xor_sync(ALL, most, step));
    return most;
}

// The codes of a tile whose first element is the block's `first`th; v becomes what they say.
template <typename F, bool DITHER>
__device__ __forceinline__ void quantize(
    float v[ROWS][4], typename F::row codes[ROWS], Steps steps, u32 shared, int first, int lane) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        u32 word = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float y = fminf(fmaxf(__fmul_rn(v[row][k], steps.inverse), -F::MOST), F::MOST);
            u32 code;
            if constexpr (DITHER)
                code = F::dithered(y, dither_of(v[row][k], shared, first + 128 * row + 4 * lane + k));
            else
                code = F::nearest(y);
            if (steps.inverse == 0.0f) code = 0;
            word |= code << (F::BITS * k);
            v[row][k] = __fmul_rn(F::value(code), steps.scale);
        }
        codes[row] = typename F::row(word);
    }
}

template <typename F>
__device__ __forceinline__ void quantize(
    float v[ROWS][4], typename F::row codes[ROWS], Steps steps, u32 most, Rounding rounding, int first, int lane) {
    if constexpr (F::DITHERS) {
        if (rounding.stochastic) {
            quantize<F, true>(v, codes, steps, mix(most ^ rounding.seed), first, lane);
            return;
        }
    }
    quantize<F, false>(v, codes, steps, 0, first, lane);
}

// What a row of codes is worth in steps of `scale`.
template <typename F>
__device__ __forceinline__ void values_of(typename F::row codes, float scale, float v[4]) {
#pragma unroll
    for (int k = 0; k < 4; k++)
        v[k] = __fmul_rn(F::value(u32(codes) >> (F::BITS * k) & ((1u << F::BITS) - 1)), scale);
}

// v <- v plus what a row of codes is worth: the next term of a sum over ranks.
template <typename F>
__device__ __forceinline__ void add_values_of(typename F::row codes, float scale, float v[4]) {
    float term[4];
    values_of<F>(codes, scale, term);
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = __fadd_rn(v[k], term[k]);
}
