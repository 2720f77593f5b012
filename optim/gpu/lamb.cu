// What 1-bit LAMB's compressed step finds out about every tensor before it moves. One warp per block of 1024 elements brings
// v', the variance that the averaged momentum m' stands for, up to date, and measures; the measures of a tensor are put
// together in an order that its size alone decides, and become what `decode_update` multiplies by. Here
//     v' = β₂·v' + weight·(m' - β₁·m)²,   d = √v·root + ε,   d' = √v'·fresh + ε,   u₀ = rate·m' / d,   u = u₀ + decay·x
#include "any.cuh"
#include "correction.cuh"
#include "ieee.cuh"
#include "places.cuh"
#include "slots.cuh"

struct __align__(16) Row {  // of one tensor
    float rate, root, fresh, unused;
};

struct __align__(16) Measure {  // the largest d / d' of entries that are alive; the sums of u₀² and u²
    float ratio, plain, decayed, unused;
};

struct __align__(16) Span {
    i64 first, count;
};

// `numels`: where tensors end. `momenta`: addresses of fp32 tensors m, or null where `momentum` holds payloads. `freshes` are
// those of v'; `values` those of x, read only where decay is not 0. `starts`: where each tensor's measures begin.
#define ARGUMENTS                                                                                                  \
    const Place *places, i64 n, const i64 *numels, const u8 *gathered, const i64 *momenta, const u8 *momentum,     \
        const i64 *variances, const i64 *freshes, const i64 *values, i64 value_type, const u8 *mask,               \
        const Row *rows, const i64 *starts, Measure *measures, i64 beta1_bits, i64 beta2_bits, i64 weight_bits,    \
        i64 eps_bits, i64 decay_bits, const u8 *proceed, i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes

struct Factors {
    float beta1, beta2, weight, eps, decay;
};
#define FACTORS Factors{number(beta1_bits), number(beta2_bits), number(weight_bits), number(eps_bits), number(decay_bits)}

__device__ __forceinline__ float gained(float m, float decayed_m, float weight) {
    float g = __fsub_rn(m, decayed_m);
    return __fmul_rn(weight, __fmul_rn(g, g));
}

template <bool USUAL>
__device__ __forceinline__ float root_of(float v) { return USUAL ? usual_root(v) : __fsqrt_rn(v); }
template <bool USUAL>
__device__ __forceinline__ float quotient_of(float n, float d) { return USUAL ? usual_quotient(n, d) : __fdiv_rn(n, d); }

// Takes in one entry; step: rate·m', 0 where the entry is dead.
template <bool USUAL, bool DECAY>
__device__ __forceinline__ void look(
    float v, float fresh, float step, float x, bool alive, const Row& row, const Factors& f, Measure& found) {
    float d = __fadd_rn(__fmul_rn(root_of<USUAL>(v), row.root), f.eps);
    float now = __fadd_rn(__fmul_rn(root_of<USUAL>(fresh), row.fresh), f.eps);
    if (alive) found.ratio = fmaxf(found.ratio, quotient_of<USUAL>(d, now));
    if (DECAY) {
        float plain = quotient_of<USUAL>(step, d);
        float u = __fadd_rn(plain, __fmul_rn(f.decay, x));
        found.plain = __fmaf_rn(plain, plain, found.plain);
        found.decayed = __fmaf_rn(u, u, found.decayed);
    }
}

// Writes what the lanes of a warp have found in a block of a tensor.
__device__ __forceinline__ void keep(Measure found, Place place, const i64* starts, Measure* measures, int lane) {
#pragma unroll
    for (int step = 16; step >= 1; step >>= 1) {
        found.ratio = fmaxf(found.ratio, __shfl_xor_sync(ALL, found.ratio, step));
        found.plain = __fadd_rn(found.plain, __shfl_xor_sync(ALL, found.plain, step));
        found.decayed = __fadd_rn(found.decayed, __shfl_xor_sync(ALL, found.decayed, step));
    }
    if (lane == 0) measures[starts[place.tensor] + place.offset / TILE] = found;
}

// ---- whole blocks at aligned addresses, momentum as payloads

constexpr int ROWS_AT_ONCE = 2;  // of 128 elements: more leave registers for fewer warps
constexpr int N = 4 * ROWS_AT_ONCE;

template <typename T>
__device__ __forceinline__ void load_rows(const typename T::raw* x, float values[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) load4(T(), x + 32 * i, values + i);
}

template <bool USUAL, bool DECAY>
__device__ __forceinline__ void look_at(
    const float v[N], const float fresh[N], float step, u32 bits, const float x[N], const Row& row, const Factors& f,
    Measure& found) {
#pragma unroll
    for (int i = 0; i < N; i++)
        look<USUAL, DECAY>(v[i], fresh[i], signed_scale(step, bits, i), DECAY ? x[i] : 0.0f, true, row, f, found);
}

template <typename X, bool DECAY>
__device__ __forceinline__ void measure_full(ARGUMENTS) {
    if (proceed != nullptr && *proceed == 0) return;
    int lane = threadIdx.x & 31;
    Factors f = FACTORS;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, TILE);
        u32 bits = words_at(gathered, slot)[word_of_lane(lane)], old_bits = words_at(momentum, slot)[word_of_lane(lane)];
        float scale = *scale_at(gathered, slot), old_scale = *scale_at(momentum, slot);
        Row row = rows[place.tensor];
        const float* variance = elements_of<f32>(variances, place) + 4 * lane;
        float* fresh = const_cast<float*>(elements_of<f32>(freshes, place)) + 4 * lane;
        const typename X::raw* value = DECAY ? elements_of<X>(values, place) + 4 * lane : nullptr;
        float step = 0.0f, same = 0.0f, other = 0.0f;
        u32 turned = 0;
        bool usual = true;
        Measure found = {};
#pragma unroll 1
        for (int at = 0; at < TILE; at += 32 * N, bits >>= N, turned >>= N) {
            float v[N], next[N], x[N];
            load_rows<f32>(fresh + at, next);
            load_rows<f32>(variance + at, v);
            if (DECAY) load_rows<X>(value + at, x);
            if (at == 0) {  // only now, for it waits for signs and scales to come
                step = __fmul_rn(row.rate, scale);
                float decayed_m = __fmul_rn(f.beta1, old_scale);
                same = gained(scale, decayed_m, f.weight);
                other = gained(scale, negative(decayed_m), f.weight);
                usual = usual_factors(row.root, f.eps) && usual_factors(row.fresh, f.eps) && usual_numerator(step);
                bits = transpose_nibbles(bits, lane);
                turned = bits ^ transpose_nibbles(old_bits, lane);
            }
            bool all_usual = usual;
#pragma unroll
            for (int i = 0; i < N; i++) {
                next[i] = __fadd_rn(__fmul_rn(f.beta2, next[i]), turned >> i & 1 ? other : same);
                all_usual &= usual_variance(v[i]) && usual_variance(next[i]);
            }
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                const float* four = next + i;
                store4(fresh + at + 32 * i, four[0], four[1], four[2], four[3]);
            }
            if (__all_sync(ALL, all_usual)) look_at<true, DECAY>(v, next, step, bits, x, row, f, found);
            else look_at<false, DECAY>(v, next, step, bits, x, row, f, found);
        }
        keep(found, place, starts, measures, lane);
    }
}

#define MEASURE(NAME, X, DECAY)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) NAME(ARGUMENTS) {                                        \
        measure_full<X, DECAY>(places, n, numels, gathered, momenta, momentum, variances, freshes, values,            \
            value_type, mask, rows, starts, measures, beta1_bits, beta2_bits, weight_bits, eps_bits, decay_bits,      \
            proceed, chunk_blocks, bits_bytes, payload_bytes);                                                        \
    }
MEASURE(measure_full, f32, false)
MEASURE(measure_full_decay_f32, f32, true)
MEASURE(measure_full_decay_bf16, bf16, true)
MEASURE(measure_full_decay_f16, f16, true)

// ---- any block

extern "C" __global__ void __launch_bounds__(THREADS) measure_any(ARGUMENTS) {
    if (proceed != nullptr && *proceed == 0) return;
    i64 warp = warp_index();
    if (warp >= n) return;
    Place place = places[warp];
    if (place.tensor < 0) return;
    int lane = threadIdx.x & 31;
    Factors f = FACTORS;
    Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, TILE);
    i64 count = count_of(place, numels, TILE);
    u32 real = real_bits(count, lane), live = real;
    if (mask != nullptr) live &= ~load_bits(mask + place.block * (TILE / 8), TILE / 32, lane);
    u32 bits = load_bits(gathered + slot.words, TILE / 32, lane);
    float scale = *scale_at(gathered, slot);
    Row row = rows[place.tensor];
    float step = __fmul_rn(row.rate, scale);
    i64 fresh = freshes[place.tensor];
    float old[ROWS][4], v[ROWS][4], next[ROWS][4], x[ROWS][4] = {};
    bool whole = count == TILE;
    if (momenta != nullptr) {
        load_any(F32, momenta[place.tensor], place.offset, live, whole, lane, old);
    } else {
        u32 old_bits = load_bits(momentum + slot.words, TILE / 32, lane);
        float old_scale = *scale_at(momentum, slot);
#pragma unroll
        for (int i = 0; i < 32; i++) old[i / 4][i % 4] = signed_scale(old_scale, old_bits, i);
    }
    load_any(F32, variances[place.tensor], place.offset, real, whole, lane, v);
    load_any(F32, fresh, place.offset, real, whole, lane, next);
    if (f.decay != 0.0f) load_any(Type(value_type), values[place.tensor], place.offset, real, whole, lane, x);
    Measure found = {};
#pragma unroll
    for (int i = 0; i < 32; i++) {
        bool alive = live >> i & 1;
        float gain = gained(signed_scale(scale, bits, i), __fmul_rn(f.beta1, old[i / 4][i % 4]), f.weight);
        float& now = next[i / 4][i % 4];
        now = __fadd_rn(__fmul_rn(f.beta2, now), alive ? gain : 0.0f);
        look<false, true>(v[i / 4][i % 4], now, alive ? signed_scale(step, bits, i) : 0.0f, x[i / 4][i % 4], alive, row, f, found);
    }
    store_any(F32, fresh, place.offset, real, lane, next);
    keep(found, place, starts, measures, lane);
}

// ---- per tensor

// One thread per tensor: count a step and write the row of what is measured with.
extern "C" __global__ void begin(
    float* steps, const float* variance_steps, i64 k, Row* rows, i64 beta1, i64 beta2, i64 corrected, const u8* proceed) {
    i64 tensor = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (tensor >= k || (proceed != nullptr && *proceed == 0)) return;
    float t = steps[tensor] + 1.0f;
    steps[tensor] = t;
    double decay1 = __longlong_as_double(beta1), decay2 = __longlong_as_double(beta2);
    rows[tensor].rate = float(1.0 / correction(decay1, t, corrected != 0));
    rows[tensor].root = float(1.0 / sqrt(correction(decay2, variance_steps[tensor], corrected != 0)));
    rows[tensor].fresh = float(1.0 / sqrt(correction(decay2, t, corrected != 0)));
}

// What a warp finds in many measures, all lanes the same.
__device__ __forceinline__ Measure together(const Measure* measures, Span span, int lane) {
    float ratio = 0.0f;
    double plain = 0.0, decayed = 0.0;
#pragma unroll 8
    for (i64 i = lane; i < span.count; i += 32) {
        Measure one = measures[span.first + i];
        ratio = fmaxf(ratio, one.ratio);
        plain += double(one.plain);
        decayed += double(one.decayed);
    }
#pragma unroll
    for (int step = 16; step >= 1; step >>= 1) {
        ratio = fmaxf(ratio, __shfl_xor_sync(ALL, ratio, step));
        plain += __shfl_xor_sync(ALL, plain, step);
        decayed += __shfl_xor_sync(ALL, decayed, step);
    }
    return {ratio, float(plain), float(decayed), 0.0f};
}

// One warp per span, so that no warp has the many blocks of a large tensor to itself.
extern "C" __global__ void gather(const Measure* measures, const Span* spans, i64 n, Measure* sums) {
    int lane = threadIdx.x & 31;
    i64 warp = warp_index();
    if (warp >= n) return;
    Measure found = together(measures, spans[warp], lane);
    if (lane == 0) sums[warp] = found;
}

// One warp per tensor: r, c̄ and from them the scalars of `decode_update`. `layer_of` tells the tensor's place in the vectors.
extern "C" __global__ void coefficients(
    const Measure* sums, const Span* spans, i64 k, const Row* rows, const i64* layer_of, float* coeff, const float* mean,
    const float* weight, float* factor, float* scalars, const double* lr_on_device, i64 lr_bits, i64 decay_bits,
    i64 lowest, i64 highest, i64 threshold, const u8* proceed) {
    int lane = threadIdx.x & 31;
    i64 tensor = warp_index();
    if (tensor >= k || (proceed != nullptr && *proceed == 0)) return;
    Measure found = together(sums, spans[tensor], lane);
    if (lane != 0) return;
    double lr = lr_on_device == nullptr ? __longlong_as_double(lr_bits) : *lr_on_device;
    float decay = number(decay_bits), ratio = found.ratio > 0.0f ? found.ratio : 1.0f;
    if (decay != 0.0f) {
        float share = found.decayed > 0.0f ? fminf(__fsqrt_rn(__fdiv_rn(found.plain, found.decayed)), 1.0f) : 1.0f;
        ratio = __fadd_rn(__fmul_rn(ratio, share), __fsub_rn(1.0f, share));
    }
    i64 layer = layer_of[tensor];
    float last = factor[layer], change = number(threshold);
    ratio = fminf(fmaxf(ratio, number(lowest)), number(highest));
    ratio = fminf(fmaxf(ratio, __fmul_rn(last, 1.0f - change)), __fmul_rn(last, 1.0f + change));
    float c = __fdiv_rn(mean[layer], weight[layer]);
    factor[layer] = ratio;
    coeff[layer] = c;
    double move = lr * double(c) * double(ratio);
    scalars[3 * tensor] = float(move * double(rows[tensor].rate));
    scalars[3 * tensor + 1] = rows[tensor].root;
    scalars[3 * tensor + 2] = float(1.0 - move * __longlong_as_double(decay_bits));
}
