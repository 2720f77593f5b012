// Adam on many tensors at once: first the factors of every tensor's step, then all elements in one pass over memory.
#include "block.cuh"

#ifndef VECTORS
#define VECTORS 1  // of four elements per thread; the same in adam.py
#endif

#ifndef RESIDENT
#define RESIDENT 6  // thread blocks on a multiprocessor at least
#endif

constexpr int CHUNK = 4 * VECTORS * THREADS;  // elements that a thread block takes, all of one tensor

// The options of a parameter group. If `lr_tensor` is not null, the learning rate is read there.
struct Options {
    double lr;
    const void* lr_tensor;
    double beta1, beta2, eps, weight_decay;
    i64 flags, unused;
};
constexpr i64 DECOUPLED = 1, BIAS_CORRECTION = 2, MAXIMIZE = 4, LR_IS_DOUBLE = 8, ZERO = 16;

// What one step multiplies the elements of one tensor by.
struct __align__(16) Factors {
    float gradient, weight1, beta2, weight2;  // the gradient's sign and scale; 1 - beta1; beta2; 1 - beta2
    float rate, root, eps, keep;              // lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t); eps; 1 - lr · weight decay
    float l2;
    int action;  // bits
    int unused[2];
};
constexpr int STEP = 1, ZERO_GRADIENT = 2;

// One thread per tensor: counts the step of those that make one and computes their factors, in double precision.
// gradients: addresses, null where there is none; found_inf and grad_scale: null, or as a GradScaler gives them.
extern "C" __global__ void __launch_bounds__(THREADS) adam_factors(
    const i64* gradients, const int* group_of, const Options* options, i64 tensors, const float* found_inf,
    const float* grad_scale, float* steps, Factors* factors) {
    i64 tensor = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (tensor >= tensors) return;
    Factors f = {};
    const Options o = options[group_of[tensor]];
    bool here = gradients[tensor] != 0;
    if (here && o.flags & ZERO) f.action |= ZERO_GRADIENT;
    if (here && (found_inf == nullptr || *found_inf == 0.0f)) {
        f.action |= STEP;
        double step = steps[tensor] += 1.0f;
        double lr = o.lr;
        if (o.lr_tensor != nullptr)
            lr = o.flags & LR_IS_DOUBLE ? *(const double*)o.lr_tensor : (double)*(const float*)o.lr_tensor;
        bool correct = o.flags & BIAS_CORRECTION;
        bool decoupled = o.flags & DECOUPLED;
        double scale = grad_scale == nullptr ? 1.0 : 1.0 / *grad_scale;
        f.gradient = float(o.flags & MAXIMIZE ? -scale : scale);
        f.weight1 = float(1.0 - o.beta1);
        f.beta2 = float(o.beta2);
        f.weight2 = float(1.0 - o.beta2);
        f.rate = float(correct ? lr / (1.0 - pow(o.beta1, step)) : lr);
        f.root = float(correct ? 1.0 / sqrt(1.0 - pow(o.beta2, step)) : 1.0);
        f.eps = float(o.eps);
        f.keep = float(decoupled ? 1.0 - lr * o.weight_decay : 1.0);
        f.l2 = float(decoupled ? 0.0 : o.weight_decay);
    }
    factors[tensor] = f;
}

// To within 1 and 2 units in the last place, for every v >= 0 and every denominator that Adam can have. The exact ones test
// each operand, which keeps the compiler from working on several elements at once.
__device__ __forceinline__ float near_root(float v) {
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(v));
    return root;
}
__device__ __forceinline__ float near_quotient(float m, float denominator) {
    float quotient;
    asm("div.approx.f32 %0, %1, %2;" : "=f"(quotient) : "f"(m), "f"(denominator));
    return quotient;
}

// One element: m and v become the new moments; returns the new parameter.
__device__ __forceinline__ float stepped(float w, float g, float& m, float& v, const Factors& f) {
    g = __fmul_rn(g, f.gradient);
    if (f.l2 != 0.0f) g = __fmaf_rn(f.l2, w, g);
    float change = __fsub_rn(g, m);  // from the nearer end, so that neither a small nor a large weight cancels
    m = f.weight1 < 0.5f ? __fmaf_rn(f.weight1, change, m) : __fmaf_rn(f.weight1 - 1.0f, change, g);
    v = __fmaf_rn(f.weight2, __fmul_rn(g, g), __fmul_rn(f.beta2, v));
    float denominator = __fmaf_rn(near_root(v), f.root, f.eps);
    return __fmaf_rn(-f.rate, near_quotient(m, denominator), __fmul_rn(w, f.keep));
}

// One thread block's elements of one tensor; `master` is null unless the parameter has an fp32 copy.
template <typename P, typename G>
struct Chunk {
    typename P::raw* param;
    typename G::raw* gradient;
    float *m, *v, *master;
};

// Elements in fours, at addresses of a whole vector. WHOLE: the chunk is full, so nothing needs to be asked.
template <typename P, typename G, bool MASTER, bool WHOLE>
__device__ __forceinline__ void fours(const Chunk<P, G>& c, const Factors& f, int n, bool zero) {
    float w[4 * VECTORS], g[4 * VECTORS], m[4 * VECTORS], v[4 * VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int at = 4 * (i * THREADS + (int)threadIdx.x);
        if (WHOLE || at + 4 <= n) {
            load4(G(), c.gradient + at, g + 4 * i);
            load4(f32(), c.m + at, m + 4 * i);
            load4(f32(), c.v + at, v + 4 * i);
            if (MASTER) load4(f32(), c.master + at, w + 4 * i);
            else load4(P(), c.param + at, w + 4 * i);
        }
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int at = 4 * (i * THREADS + (int)threadIdx.x);
        if (WHOLE || at + 4 <= n) {
            float *wi = w + 4 * i, *mi = m + 4 * i, *vi = v + 4 * i;
#pragma unroll
            for (int k = 0; k < 4; k++) wi[k] = stepped(wi[k], g[4 * i + k], mi[k], vi[k], f);
            store4(c.m + at, mi[0], mi[1], mi[2], mi[3]);
            store4(c.v + at, vi[0], vi[1], vi[2], vi[3]);
            if (MASTER) store4(c.master + at, wi[0], wi[1], wi[2], wi[3]);
            store4(c.param + at, narrow(P(), wi[0]), narrow(P(), wi[1]), narrow(P(), wi[2]), narrow(P(), wi[3]));
            if (zero) store4(c.gradient + at, 0, 0, 0, 0);
        }
    }
}

template <typename P, typename G, bool MASTER>
__device__ __forceinline__ void single(const Chunk<P, G>& c, const Factors& f, int at, bool zero) {
    float m = c.m[at], v = c.v[at];
    float w = MASTER ? c.master[at] : widen(P(), c.param[at]);
    w = stepped(w, widen(G(), c.gradient[at]), m, v, f);
    c.m[at] = m;
    c.v[at] = v;
    if (MASTER) c.master[at] = w;
    c.param[at] = narrow(P(), w);
    if (zero) c.gradient[at] = 0;
}

template <typename T>
__device__ __forceinline__ T* at_address(i64 address, i64 offset) { return reinterpret_cast<T*>(address) + offset; }

// blocks: for each thread block a tensor and the number of its chunk; addresses: (4, tensors) of parameters, of both
// moments and of fp32 copies of parameters; numels: of every tensor.
template <typename P, typename G, bool MASTER>
__device__ __forceinline__ void adam(
    const int2* blocks, const i64* addresses, const i64* gradients, const i64* numels, const Factors* factors,
    i64 tensors) {
    int2 block = blocks[blockIdx.x];
    int tensor = block.x;
    i64 first = (i64)block.y * CHUNK;
    Factors f = factors[tensor];
    int n = (int)min(numels[tensor] - first, (i64)CHUNK);
    Chunk<P, G> c;
    c.param = at_address<typename P::raw>(addresses[tensor], first);
    c.m = at_address<float>(addresses[tensors + tensor], first);
    c.v = at_address<float>(addresses[2 * tensors + tensor], first);
    c.master = MASTER ? at_address<float>(addresses[3 * tensors + tensor], first) : nullptr;
    c.gradient = at_address<typename G::raw>(gradients[tensor], first);
    bool zero = f.action & ZERO_GRADIENT;
    if (!(f.action & STEP)) {
        if (zero)
            for (int at = threadIdx.x; at < n; at += THREADS) c.gradient[at] = 0;
        return;
    }

    i64 low = (i64)c.m | (i64)c.v | (i64)c.master | (i64)c.param * (4 / sizeof(*c.param)) |
        (i64)c.gradient * (4 / sizeof(*c.gradient));  // a vector of 16-bit numbers is half as long
    bool aligned = (low & 15) == 0;
    if (aligned && n == CHUNK) {
        fours<P, G, MASTER, true>(c, f, n, zero);
    } else {
        if (aligned) fours<P, G, MASTER, false>(c, f, n, zero);
        for (int at = (aligned ? n & ~3 : 0) + threadIdx.x; at < n; at += THREADS) single<P, G, MASTER>(c, f, at, zero);
    }
}

#define ADAM(name, P, G, MASTER)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) adam_##name(                                     \
        const int2* blocks, const i64* addresses, const i64* gradients, const i64* numels, const Factors* factors,   \
        i64 tensors) {                                                                                               \
        adam<P, G, MASTER>(blocks, addresses, gradients, numels, factors, tensors);                                  \
    }
#define GRADIENTS(name, P, MASTER) \
    ADAM(name##_f32, P, f32, MASTER) ADAM(name##_bf16, P, bf16, MASTER) ADAM(name##_f16, P, f16, MASTER)
GRADIENTS(f32, f32, false)
GRADIENTS(bf16, bf16, false)
GRADIENTS(f16, f16, false)
GRADIENTS(master_bf16, bf16, true)
GRADIENTS(master_f16, f16, true)
