// Products of small matrices on the tensor cores, each held by one warp: of pairs of fp16 as PTX's mma.m16n8k16 deals them
// out. With g = lane / 4 and t = lane % 4, and P(i) for the columns 2t + 8i and 2t + 8i + 1 of A or rows of B:
//   A (16, 16): a[0], a[1], a[2], a[3] = A[g, P(0)], A[g + 8, P(0)], A[g, P(1)], A[g + 8, P(1)]
//   B (16, 8):  b[0], b[1] = B[P(0), g], B[P(1), g]
//   A·B (16, 8): columns 2t and 2t + 1 of row g, then of row g + 8; so two of these, side by side, are an A.
// Integers that fp16 or fp32 can hold, and all sums on the way to them, come out exact.
#pragma once
#include "block.cuh"

constexpr u32 ONES = 0x3C003C00u;    // 1 and 1
constexpr u32 SECOND = 0x80000000u;  // the sign of a pair's second
constexpr u32 BOTH = 0x80008000u;    // the signs of both

__device__ __forceinline__ void multiply(const u32 a[4], u32 b0, u32 b1, u32 product[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %8};"
        : "=r"(product[0]), "=r"(product[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}

__device__ __forceinline__ void multiply(const u32 a[4], u32 b0, u32 b1, float product[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(product[0]), "=f"(product[1]), "=f"(product[2]), "=f"(product[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

__device__ __forceinline__ u32 subtract_pairs(u32 a, u32 b) {
    u32 difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

__device__ __forceinline__ u32 multiply_add_pairs(u32 a, u32 b, u32 c) {
    u32 sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}
