// What 1-bit LAMB's compressed step does to every tensor in one pass: it moves x at a rate that is known before, brings v',
// the variance that the averaged momentum m' stands for, up to date, and measures what the next rate follows from. One warp
// per block of 1024 elements; the measures of a tensor are put together in an order that its size alone decides. Here
//     v' = β₂·v' + weight·(m' - β₁·m)²,   d = √v·root + ε,   d' = √v'·fresh + ε,   u₀ = rate·m' / d,   u = u₀ + decay·x,
//     x = x - move·u
#include "any.cuh"
#include "correction.cuh"
#include "full.cuh"
#include "ieee.cuh"
#include "rows.cuh"
#include "slots.cuh"

struct __align__(16) Row {  // of one tensor
    float rate, root, fresh, move;
};

struct __align__(16) Measure {  // the largest d / d' of entries that are alive; the sums of u₀² and u²
    float ratio, plain, decayed, unused;
};

struct __align__(16) Span {
    i64 first, count;
};

// `numels`: where tensors end. `momenta`: addresses of fp32 tensors m, or null where `momentum` holds payloads; it becomes a
// copy of `gathered`. `freshes` are addresses of v'. `starts`: where each tensor's measures begin.
#define ARGUMENTS                                                                                                     \
    const Place *places, i64 n, const i64 *numels, const u8 *gathered, const i64 *momenta, u8 *momentum,              \
        const i64 *params, i64 param_type, const i64 *masters, const i64 *variances, const i64 *freshes,              \
        const u8 *mask, const Row *rows, const i64 *starts, Measure *measures, i64 beta1_bits, i64 beta2_bits,        \
        i64 weight_bits, i64 eps_bits, i64 decay_bits, const u8 *proceed, i64 chunk_blocks, i64 bits_bytes,           \
        i64 payload_bytes

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

// Measures one entry and returns where it moves to; step: rate·m', 0 where the entry is dead.
template <bool USUAL>
__device__ __forceinline__ float moved(
    float x, float v, float fresh, float step, bool alive, const Row& row, const Factors& f, Measure& found) {
    float d = __fadd_rn(__fmul_rn(root_of<USUAL>(v), row.root), f.eps);
    float now = __fadd_rn(__fmul_rn(root_of<USUAL>(fresh), row.fresh), f.eps);
    if (alive) found.ratio = fmaxf(found.ratio, quotient_of<USUAL>(d, now));
    float plain = quotient_of<USUAL>(step, d);
    float u = __fadd_rn(plain, __fmul_rn(f.decay, x));
    found.plain = __fmaf_rn(plain, plain, found.plain);
    found.decayed = __fmaf_rn(u, u, found.decayed);
    return __fsub_rn(x, __fmul_rn(row.move, u));
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

// ---- whole blocks at aligned addresses, momentum as payloads; MASKED: some elements take no part

template <bool USUAL, bool MASKED>
__device__ __forceinline__ void move_all(
    float x[N], const float v[N], const float fresh[N], float step, u32 bits, u32 live, const Row& row, const Factors& f,
    Measure& found) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        bool alive = !MASKED || (live >> i & 1);
        x[i] = moved<USUAL>(x[i], v[i], fresh[i], alive ? signed_scale(step, bits, i) : 0.0f, alive, row, f, found);
    }
}

template <typename P, bool MASTER, bool MASKED>
__device__ __forceinline__ void update_full(ARGUMENTS) {
    if (proceed != nullptr && *proceed == 0) return;
    int lane = threadIdx.x & 31;
    Factors f = FACTORS;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, TILE);
        u32* old_words = reinterpret_cast<u32*>(momentum + slot.words) + word_of_lane(lane);
        u32 bits = words_at(gathered, slot)[word_of_lane(lane)], old_bits = *old_words;
        float scale = *scale_at(gathered, slot), old_scale = *scale_at(momentum, slot);
        u32 live = mask_word<MASKED>(mask, place.block, lane);
        Row row = rows[place.tensor];
        const float* variance = lane_of<f32>(variances, place, lane);
        float* fresh = lane_of<f32>(freshes, place, lane);
        typename P::raw* param = lane_of<P>(params, place, lane);
        float* master = MASTER ? lane_of<f32>(masters, place, lane) : nullptr;
        float step = 0.0f, same = 0.0f, other = 0.0f;
        u32 turned = 0;
        bool usual = true;
        Measure found = {};
#pragma unroll 1
        for (int at = 0; at < TILE; at += 32 * N, bits >>= N, turned >>= N, live >>= N) {
            float v[N], next[N], x[N];
            load_rows<f32>(fresh + at, next);
            load_rows<f32>(variance + at, v);
            if (MASTER) load_rows<f32>(master + at, x);
            else load_rows<P>(param + at, x);
            if (at == 0) {  // only now, for it waits for signs and scales to come
                step = __fmul_rn(row.rate, scale);
                float decayed_m = __fmul_rn(f.beta1, old_scale);
                same = gained(scale, decayed_m, f.weight);
                other = gained(scale, negative(decayed_m), f.weight);
                usual = usual_factors(row.root, f.eps) && usual_factors(row.fresh, f.eps) && usual_numerator(step);
                *old_words = bits;
                bits = transpose_nibbles(bits, lane);
                turned = bits ^ transpose_nibbles(old_bits, lane);
                live = live_of_word<MASKED>(live, lane);
                if (lane == 0) *scale_at(momentum, slot) = scale;  // all lanes have read the old one
            }
            bool all_usual = usual;
#pragma unroll
            for (int i = 0; i < N; i++) {
                bool alive = !MASKED || (live >> i & 1);
                float gain = turned >> i & 1 ? other : same;
                next[i] = __fadd_rn(__fmul_rn(f.beta2, next[i]), alive ? gain : 0.0f);
            }
            store_rows<f32>(fresh + at, next);
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (MASKED && !(live >> i & 1)) v[i] = next[i] = 1.0f;
                all_usual &= usual_variance(v[i]) && usual_variance(next[i]);
            }
            if (__all_sync(ALL, all_usual)) move_all<true, MASKED>(x, v, next, step, bits, live, row, f, found);
            else move_all<false, MASKED>(x, v, next, step, bits, live, row, f, found);
            if (MASTER) store_rows<f32>(master + at, x);
            store_rows<P>(param + at, x);
        }
        keep(found, place, starts, measures, lane);
    }
}

#define UPDATE(NAME, P, MASTER, MASKED)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) NAME(ARGUMENTS) {                                         \
        update_full<P, MASTER, MASKED>(places, n, numels, gathered, momenta, momentum, params, param_type, masters,    \
            variances, freshes, mask, rows, starts, measures, beta1_bits, beta2_bits, weight_bits, eps_bits,           \
            decay_bits, proceed, chunk_blocks, bits_bytes, payload_bytes);                                             \
    }
UPDATE(update_full_f32, f32, false, false)
UPDATE(update_full_bf16, bf16, false, false)
UPDATE(update_full_f16, f16, false, false)
UPDATE(update_full_master_bf16, bf16, true, false)
UPDATE(update_full_master_f16, f16, true, false)
UPDATE(update_masked_f32, f32, false, true)
UPDATE(update_masked_bf16, bf16, false, true)
UPDATE(update_masked_f16, f16, false, true)
UPDATE(update_masked_master_bf16, bf16, true, true)
UPDATE(update_masked_master_f16, f16, true, true)

// ---- any block

extern "C" __global__ void __launch_bounds__(THREADS) update_any(ARGUMENTS) {
    if (proceed != nullptr && *proceed == 0) return;
    i64 warp = warp_index();
    if (warp >= n) return;
    Place place = places[warp];
    int lane = threadIdx.x & 31;
    Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, TILE);
    u32* old_words = reinterpret_cast<u32*>(momentum + slot.words) + word_of_lane(lane);
    u32 bits = words_at(gathered, slot)[word_of_lane(lane)], old_bits = *old_words;
    float scale = *scale_at(gathered, slot), old_scale = *scale_at(momentum, slot);
    *old_words = bits;
    bits = transpose_nibbles(bits, lane);
    old_bits = transpose_nibbles(old_bits, lane);
    if (lane == 0) *scale_at(momentum, slot) = scale;  // all lanes have read the old one
    if (place.tensor < 0) return;
    Factors f = FACTORS;
    i64 count = count_of(place, numels, TILE);
    u32 real = real_bits(count, lane), live = real;
    if (mask != nullptr) live &= ~load_bits(mask + place.block * (TILE / 8), TILE / 32, lane);
    Row row = rows[place.tensor];
    float step = __fmul_rn(row.rate, scale);
    i64 fresh = freshes[place.tensor], param = params[place.tensor], master = address_of(masters, place);
    float old[ROWS][4], v[ROWS][4], next[ROWS][4], x[ROWS][4];
    bool whole = count == TILE;
    if (momenta != nullptr) {
        load_any(F32, momenta[place.tensor], place.offset, live, whole, lane, old);
    } else {
#pragma unroll
        for (int i = 0; i < 32; i++) old[i / 4][i % 4] = signed_scale(old_scale, old_bits, i);
    }
    load_any(F32, variances[place.tensor], place.offset, real, whole, lane, v);
    load_any(F32, fresh, place.offset, real, whole, lane, next);
    if (master != 0) load_any(F32, master, place.offset, real, whole, lane, x);
    else load_any(Type(param_type), param, place.offset, real, whole, lane, x);
    Measure found = {};
#pragma unroll
    for (int i = 0; i < 32; i++) {
        bool alive = live >> i & 1;
        float gain = gained(signed_scale(scale, bits, i), __fmul_rn(f.beta1, old[i / 4][i % 4]), f.weight);
        float& now = next[i / 4][i % 4];
        now = __fadd_rn(__fmul_rn(f.beta2, now), alive ? gain : 0.0f);
        float& to = x[i / 4][i % 4];
        to = moved<false>(to, v[i / 4][i % 4], now, alive ? signed_scale(step, bits, i) : 0.0f, alive, row, f, found);
    }
    store_any(F32, fresh, place.offset, real, lane, next);
    if (master != 0) store_any(F32, master, place.offset, real, lane, x);
    store_any(Type(param_type), param, place.offset, real, lane, x);
    keep(found, place, starts, measures, lane);
}

// ---- per tensor

// One thread per tensor: count a step, and write the row of what is moved and measured with. `layer_of` tells the tensor's
// place in the vectors: c̄ from its two running means, and r.
extern "C" __global__ void begin(
    float* steps, const float* variance_steps, i64 k, Row* rows, const i64* layer_of, float* coeff, const float* mean,
    const float* weight, const float* factor, const double* lr_on_device, i64 lr_bits, i64 beta1, i64 beta2,
    i64 corrected, const u8* proceed) {
    i64 tensor = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (tensor >= k || (proceed != nullptr && *proceed == 0)) return;
    float t = steps[tensor] + 1.0f;
    steps[tensor] = t;
    double decay1 = __longlong_as_double(beta1), decay2 = __longlong_as_double(beta2);
    double lr = lr_on_device == nullptr ? __longlong_as_double(lr_bits) : *lr_on_device;
    i64 layer = layer_of[tensor];
    float c = __fdiv_rn(mean[layer], weight[layer]);
    coeff[layer] = c;
    rows[tensor].rate = float(1.0 / correction(decay1, t, corrected != 0));
    rows[tensor].root = float(1.0 / sqrt(correction(decay2, variance_steps[tensor], corrected != 0)));
    rows[tensor].fresh = float(1.0 / sqrt(correction(decay2, t, corrected != 0)));
    rows[tensor].move = float(lr * double(c) * double(factor[layer]));
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

// One warp per tensor: r of the next step.
extern "C" __global__ void factors(
    const Measure* sums, const Span* spans, i64 k, const i64* layer_of, float* factor, i64 decay_bits, i64 lowest,
    i64 highest, i64 threshold, const u8* proceed) {
    int lane = threadIdx.x & 31;
    i64 tensor = warp_index();
    if (tensor >= k || (proceed != nullptr && *proceed == 0)) return;
    Measure found = together(sums, spans[tensor], lane);
    if (lane != 0) return;
    float ratio = found.ratio > 0.0f ? found.ratio : 1.0f;
    if (number(decay_bits) != 0.0f) {
        float share = found.decayed > 0.0f ? fminf(__fsqrt_rn(__fdiv_rn(found.plain, found.decayed)), 1.0f) : 1.0f;
        ratio = __fadd_rn(__fmul_rn(ratio, share), __fsub_rn(1.0f, share));
    }
    float* last = factor + layer_of[tensor];
    float change = number(threshold);
    ratio = fminf(fmaxf(ratio, number(lowest)), number(highest));
    *last = fminf(fmaxf(ratio, __fmul_rn(*last, 1.0f - change)), __fmul_rn(*last, 1.0f + change));
}
