// Roots and quotients rounded as IEEE 754 asks, without a branch per number, for operands whose size is known to be usual.
// The compiler's own sqrt and division test every operand, which keeps it from working on several numbers at once.
#pragma once
#include "block.cuh"

// v is from 2^-101 to 2^40: the steps of usual_root() neither overflow nor lose bits.
__device__ __forceinline__ bool usual_variance(float v) {
    constexpr u32 LEAST = 0x0D000000u, MOST = 0x53800000u;
    return __float_as_uint(v) - LEAST <= MOST - LEAST;
}

// With these and a usual variance, n / (√v·root + eps) is a normal number or 0, and so are the remainders on the way.
__device__ __forceinline__ bool usual_numerator(float n) {
    return n == 0.0f || (fabsf(n) >= 0x1p-80f && fabsf(n) <= 0x1p60f);
}
__device__ __forceinline__ bool usual_factors(float root, float eps) {
    return root >= 0x1p-10f && root <= 0x1p13f && eps >= 0.0f && eps <= 0x1p33f;
}

__device__ __forceinline__ float usual_root(float v) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
    float root = __fmul_rn(v, y);
    return __fmaf_rn(__fmaf_rn(-root, root, v), __fmul_rn(y, 0.5f), root);
}

__device__ __forceinline__ float usual_quotient(float n, float d) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(d));
    y = __fmaf_rn(y, __fmaf_rn(-d, y, 1.0f), y);
    float quotient = __fmul_rn(n, y);
    quotient = __fmaf_rn(__fmaf_rn(-d, quotient, n), y, quotient);
    return __fmaf_rn(__fmaf_rn(-d, quotient, n), y, quotient);
}
