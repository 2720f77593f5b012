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

// 3·2^22. Near it the steps of fp32 are 1: added to a number below 2^21, it rounds that to a whole one, ties to even, and
// the sum's low bits are the whole one in two's complement, for the constant's own are 0. Taken away again, it leaves
// the whole number, never -0.
constexpr float WHOLE = 12582912.0f;

// One byte of each of 4 words, the first word's lowest: 0 picks the last byte of every word, 3 the first.
template <int BYTE>
__device__ __forceinline__ u32 gather_bytes(const u32 words[4]) {
    constexpr u32 PAIR = (4 + BYTE) << 4 | BYTE;
    return __byte_perm(__byte_perm(words[0], words[1], PAIR), __byte_perm(words[2], words[3], PAIR), 0x5410);
}

// Two's complement integers, +-MOST at most. `nearest` and `dithered` leave a code in the low bits of a word.
struct Integer {
    static constexpr bool DITHERS = true;
    // y = v·(MOST / largest), both rounded, exceeds MOST by less than half a step, and is rounded to it.
    static __device__ __forceinline__ u32 nearest(float y) { return __float_as_uint(__fadd_rn(y, WHOLE)); }
    static __device__ __forceinline__ u32 dithered(float y, float dither) {
        float whole = __fsub_rn(__fadd_rn(y, WHOLE), WHOLE);
        float below = whole > y ? __fsub_rn(whole, 1.0f) : whole;
        return nearest(dither < __fsub_rn(y, below) ? __fadd_rn(below, 1.0f) : below);
    }
};

struct Int8 : Integer {
    typedef u32 row;  // the codes of 4 neighbours
    static constexpr int BITS = 8;
    static constexpr float MOST = 127.0f;
    static __device__ __forceinline__ row pack(const u32 codes[4]) { return gather_bytes<0>(codes); }
    // The byte 128 + q, as the last of a number from 2^23 on, where the steps of fp32 are 1: 2^23 + 128 + q.
    static __device__ __forceinline__ float value(row codes, int k) {
        return __fsub_rn(__uint_as_float(__byte_perm(codes ^ 0x80808080u, 0x4B000000u, 0x7650 + k)), 8388736.0f);
    }
};

struct Int4 : Integer {
    typedef u16 row;
    static constexpr int BITS = 4;
    static constexpr float MOST = 7.0f;
    // With 8 more none is negative, so that a sum of shifted codes carries nothing; 8 is then the bit of the sign.
    static __device__ __forceinline__ row pack(const u32 codes[4]) {
        u32 sum = codes[0] + (codes[1] << 4) + (codes[2] << 8) + (codes[3] << 12);
        return row((sum + 0x8888u) ^ 0x8888u);
    }
    // The nibble 8 + q stays where it is, in a number from 2^(23 - 4k) on: there bit 4k is worth 1.
    static __device__ __forceinline__ float value(row codes, int k) {
        u32 exponent = (150u - 4 * k) << 23, nibble = (codes ^ 0x8888u) & (0xFu << (4 * k));
        return __fsub_rn(__uint_as_float(exponent | nibble), float((1 << (23 - 4 * k)) + 8));
    }
};

// e4m3: sign, 4 bits of exponent, 3 of fraction; 448 at most, in steps of 2^-9 below 2^-6.
struct Fp8 {
    typedef u32 row;
    static constexpr int BITS = 8;
    static constexpr bool DITHERS = false;
    static constexpr float MOST = 448.0f;
    // Leaves the code in the first byte of a word. At 1.5·2^20 times the power of two in y, or 2^-6 if that is more, fp32
    // has the steps that e4m3 has at y, so an addition rounds, ties to even; what exceeds 448 by a rounding becomes 448.
    // Then 2^-120, the difference of the exponents, puts e4m3's bits where fp32 has its own, 4 zeros between: fp32's
    // subnormal numbers are then e4m3's. The sign is y's, for -0 and for what is rounded to it.
    static __device__ __forceinline__ u32 nearest(float y) {
        u32 word = __float_as_uint(y);
        float coarse = __fmul_rn(__uint_as_float(max(word & 0x7F800000u, 0x3C800000u)), 1572864.0f);
        float rounded = __fsub_rn(__fadd_rn(y, coarse), coarse);
        return __float_as_uint(__fmul_rn(rounded, 7.52316384526264e-37f)) << 4 | (word & 0x80000000u);
    }
    static __device__ __forceinline__ row pack(const u32 codes[4]) { return gather_bytes<3>(codes); }
    static __device__ __forceinline__ float value(row codes, int k) {
        u32 first = __byte_perm(codes, 0, k << 12 | 0x444);
        u32 word = u32(int(first) >> 4) & 0x87F00000u;
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

// The larger magnitude; NaN where either is.
__device__ __forceinline__ float larger(float a, float b) {
    float most, one = fabsf(a), other = fabsf(b);
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(one), "f"(other));
    return most;
}

// The bits of the largest magnitude that a lane holds, some NaN's if there is any.
__device__ __forceinline__ u32 largest_of(const float v[ROWS][4]) {
    float most[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4 * ROWS; i++) most[i % 4] = larger(most[i % 4], v[i / 4][i % 4]);
    return __float_as_uint(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

// The codes of a tile whose first element is the block's `first`th.
template <typename F, bool DITHER>
__device__ __forceinline__ void quantize(
    const float v[ROWS][4], typename F::row codes[ROWS], Steps steps, u32 shared, int first, int lane) {
    u32 kept = steps.inverse == 0.0f ? 0 : ALL;  // a number that is not finite has no code
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        u32 code[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float y = __fmul_rn(v[row][k], steps.inverse);
            if constexpr (DITHER) {
                // Or what a rounding took beyond MOST could be drawn further up.
                y = fminf(fmaxf(y, -F::MOST), F::MOST);
                code[k] = F::dithered(y, dither_of(v[row][k], shared, first + 128 * row + 4 * lane + k));
            } else {
                code[k] = F::nearest(y);
            }
        }
        codes[row] = F::pack(code) & kept;
    }
}

template <typename F>
__device__ __forceinline__ void quantize(
    const float v[ROWS][4], typename F::row codes[ROWS], Steps steps, u32 most, Rounding rounding, int first, int lane) {
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
    for (int k = 0; k < 4; k++) v[k] = __fmul_rn(F::value(codes, k), scale);
}

// v <- v plus what a row of codes is worth: the next term of a sum over ranks.
template <typename F>
__device__ __forceinline__ void add_values_of(typename F::row codes, float scale, float v[4]) {
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = __fadd_rn(v[k], __fmul_rn(F::value(codes, k), scale));
}
