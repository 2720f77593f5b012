// Shares of a mean.
#pragma once
#include "block.cuh"

// Divides by a number of ranks as __fdiv_rn does, but without its branches: no load is moved before one. In fp64, a
// reciprocal that is right to 45 bits and the remainder, which is exact, give a quotient that is exact where fp64 has it
// and else wrong by 2^-52 of it at most. A quotient that does not itself lie halfway between two numbers of fp32 is further
// from there, up to 2^24 ranks: it is rounded the right way. Infinity, whose remainder is none, stays what it is.
struct Divider {
    double ranks;
    double inverse;
    __device__ __forceinline__ explicit Divider(int count) : ranks(count) {
        float near, whole = float(count);
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(whole));
        inverse = fma(fma(-ranks, double(near), 1.0), double(near), double(near));
    }
    __device__ __forceinline__ float share(float scale) const {
        double quotient = double(scale) * inverse;
        float rounded = float(fma(fma(-ranks, quotient, double(scale)), inverse, quotient));
        return isinf(scale) ? scale : rounded;
    }
};
