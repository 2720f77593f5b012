// A step of 0/1 Adam that a rank makes by itself, and how it is taken back, one warp per block of 1024 elements:
//     m' = β₁·m + α·g,   a' = a + share·(m' - a),   x = kept·y - rate·a' / (√v·root + ε)
// An entry whose variance is 0 has momentum 0. onebit.optim.local_steps says what these numbers are.
#include "ieee.cuh"
#include "rows.cuh"

struct __align__(16) Row {  // of one tensor
    float share, rate, kept, root;
};

// Addresses of tensors: `starts` y, `means` a. `finite` is set before a step, and cleared where some m' is not finite;
// neither m nor a of such an entry is changed.
#define ARGUMENTS                                                                                                    \
    const Place *places, i64 n, const i64 *numels, const i64 *grads, i64 grad_type, const i64 *params, i64 param_type, \
        const i64 *momenta, const i64 *means, const i64 *starts, const i64 *variances, const Row *rows, u8 *finite,  \
        i64 beta1_bits, i64 alpha_bits, i64 eps_bits

__device__ __forceinline__ float next_momentum(float m, float g, float v, float beta1, float alpha) {
    return v == 0.0f ? 0.0f : sum_of_two(__fmul_rn(beta1, m), alpha, g);
}

__device__ __forceinline__ float moved(float y, float a, float v, Row row, float eps) {
    float kept = __fmul_rn(row.kept, y);
    if (v == 0.0f) return kept;
    return __fsub_rn(kept, __fdiv_rn(__fmul_rn(row.rate, a), __fadd_rn(__fmul_rn(__fsqrt_rn(v), row.root), eps)));
}

// ---- whole blocks of 1024 elements at aligned addresses

template <typename G>
__device__ __forceinline__ void step_full(ARGUMENTS) {
    int lane = threadIdx.x & 31;
    float beta1 = number(beta1_bits), alpha = number(alpha_bits), eps = number(eps_bits);
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        Row row = rows[place.tensor];
        bool usual_row = usual_factors(row.root, eps), all_finite = true;
        const typename G::raw* grad = lane_of<G>(grads, place, lane);
        float *momentum = lane_of<f32>(momenta, place, lane), *mean = lane_of<f32>(means, place, lane);
        const float *start = lane_of<f32>(starts, place, lane), *variance = lane_of<f32>(variances, place, lane);
        i64 param = params[place.tensor];
#pragma unroll 1
        for (int at = 0; at < TILE; at += 128 * ROWS_AT_ONCE) {
            float g[N], m[N], a[N], y[N], v[N];
            load_rows<G>(grad + at, g);
            load_rows<f32>(momentum + at, m);
            load_rows<f32>(mean + at, a);
            load_rows<f32>(variance + at, v);
            load_rows<f32>(start + at, y);
            bool usual = usual_row;
#pragma unroll
            for (int i = 0; i < N; i++) {
                float next = next_momentum(m[i], g[i], v[i], beta1, alpha);
                bool finite_here = isfinite(next);
                all_finite &= finite_here;
                if (finite_here) {
                    m[i] = next;
                    a[i] = __fadd_rn(a[i], __fmul_rn(row.share, __fsub_rn(next, a[i])));
                }
                usual &= usual_variance(v[i]) && usual_numerator(__fmul_rn(row.rate, a[i]));
            }
            store_rows<f32>(momentum + at, m);
            store_rows<f32>(mean + at, a);
            if (__all_sync(ALL, usual)) {
#pragma unroll
                for (int i = 0; i < N; i++) {
                    float d = __fadd_rn(__fmul_rn(usual_root(v[i]), row.root), eps);
                    y[i] = __fsub_rn(__fmul_rn(row.kept, y[i]), usual_quotient(__fmul_rn(row.rate, a[i]), d));
                }
            } else {
#pragma unroll
                for (int i = 0; i < N; i++) y[i] = moved(y[i], a[i], v[i], row, eps);
            }
            i64 first = place.offset + 4 * lane + at;
            if (param_type == F32) store_rows<f32>(reinterpret_cast<float*>(param) + first, y);
            else if (param_type == BF16) store_rows<bf16>(reinterpret_cast<u16*>(param) + first, y);
            else store_rows<f16>(reinterpret_cast<u16*>(param) + first, y);
        }
        if (!__all_sync(ALL, all_finite) && lane == 0) *finite = 0;
    }
}

#define STEP(G)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) step_full_##G(ARGUMENTS) {                            \
        step_full<G>(places, n, numels, grads, grad_type, params, param_type, momenta, means, starts, variances,   \
            rows, finite, beta1_bits, alpha_bits, eps_bits);                                                       \
    }
STEP(f32)
STEP(bf16)
STEP(f16)

// ---- any block

__device__ __forceinline__ float load_one(Type type, i64 base, i64 at) {
    if (base == 0) return 0.0f;
    if (type == F32) return reinterpret_cast<const float*>(base)[at];
    u16 word = reinterpret_cast<const u16*>(base)[at];
    return type == BF16 ? widen(bf16(), word) : widen(f16(), word);
}

__device__ __forceinline__ void store_one(Type type, i64 base, i64 at, float value) {
    if (type == F32) reinterpret_cast<float*>(base)[at] = value;
    else reinterpret_cast<u16*>(base)[at] = type == BF16 ? narrow(bf16(), value) : narrow(f16(), value);
}

extern "C" __global__ void __launch_bounds__(THREADS) step_any(ARGUMENTS) {
    float beta1 = number(beta1_bits), alpha = number(alpha_bits), eps = number(eps_bits);
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        i64 count = count_of(place, numels, TILE);
        for (i64 at = place.offset + (threadIdx.x & 31); at < place.offset + count; at += 32) {
            float* m = reinterpret_cast<float*>(momenta[place.tensor]) + at;
            float* a = reinterpret_cast<float*>(means[place.tensor]) + at;
            float v = load_one(F32, variances[place.tensor], at);
            float next = next_momentum(*m, load_one(Type(grad_type), grads[place.tensor], at), v, beta1, alpha);
            Row row = rows[place.tensor];
            if (isfinite(next)) {
                *m = next;
                *a = __fadd_rn(*a, __fmul_rn(row.share, __fsub_rn(next, *a)));
            } else {
                *finite = 0;
            }
            float x = moved(load_one(F32, starts[place.tensor], at), *a, v, row, eps);
            store_one(Type(param_type), params[place.tensor], at, x);
        }
    }
}

// Where the step found a number that is not finite: m <- m before it, a <- a before it · (1 - share), to within rounding,
// and the parameters that follow. Nearly always there is nothing to do, so a few warps loop over all blocks.
extern "C" __global__ void __launch_bounds__(THREADS) take_back(ARGUMENTS) {
    if (*finite) return;
    float beta1 = number(beta1_bits), alpha = number(alpha_bits), eps = number(eps_bits);
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        i64 count = count_of(place, numels, TILE);
        for (i64 at = place.offset + (threadIdx.x & 31); at < place.offset + count; at += 32) {
            float* m = reinterpret_cast<float*>(momenta[place.tensor]) + at;
            float* a = reinterpret_cast<float*>(means[place.tensor]) + at;
            float v = load_one(F32, variances[place.tensor], at);
            float g = load_one(Type(grad_type), grads[place.tensor], at);
            Row row = rows[place.tensor];
            if (v != 0.0f && isfinite(g)) {
                *a = row.share < 1.0f ? __fdiv_rn(__fsub_rn(*a, __fmul_rn(row.share, *m)), 1.0f - row.share) : 0.0f;
                *m = beta1 != 0.0f ? __fdiv_rn(__fsub_rn(*m, __fmul_rn(alpha, g)), beta1) : 0.0f;
            }
            *a = __fmul_rn(*a, 1.0f - row.share);
            float x = moved(load_one(F32, starts[place.tensor], at), *a, v, row, eps);
            store_one(Type(param_type), params[place.tensor], at, x);
        }
    }
}
