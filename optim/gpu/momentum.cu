// The fused step of 1-bit Adam, one warp per block. onebit.optim.kernels says what each kernel computes and in which
// order; every operation is rounded once. Pointers come from tables, so gradients are read where they lie.
#include "any.cuh"
#include "correction.cuh"
#include "full.cuh"
#include "ieee.cuh"
#include "places.cuh"
#include "slots.cuh"

// What kernels are given; those for whole blocks leave some of it aside. `numels`: where tensors end. `momenta`: addresses
// of fp32 tensors, or null where `momentum` holds payloads. `params` is null where nothing is added to gradients.
#define LOCAL_ARGUMENTS                                                                                             \
    const Place *places, i64 n, const i64 *numels, const i64 *grads, i64 grad_type, const i64 *params, i64 param_type, \
        const i64 *momenta, const u8 *momentum, float *residual, const u8 *mask, i64 beta1, i64 alpha, i64 l2
#define UPDATE_ARGUMENTS                                                                                          \
    const Place *places, i64 n, const i64 *numels, const u8 *gathered, u8 *momentum, const i64 *params,           \
        i64 param_type, const i64 *masters, const i64 *variances, const u8 *mask, const float *scalars, i64 eps,  \
        const u8 *proceed
#define SIZE_ARGUMENTS i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes, i64 block_size

// ---- whole blocks of 1024 elements at aligned addresses, momentum as payloads; MASKED: some take no part

__device__ __forceinline__ void load_full_of_type(Type type, const i64* table, Place place, int lane, float values[32]) {
    if (type == F32) load_full<f32>(elements_of<f32>(table, place), lane, values);
    else if (type == BF16) load_full<bf16>(elements_of<bf16>(table, place), lane, values);
    else load_full<f16>(elements_of<f16>(table, place), lane, values);
}

// g + l2·p
template <typename G, bool L2>
__device__ __forceinline__ void load_gradient(
    const i64* grads, const i64* params, Type param_type, Place place, int lane, float l2, float c[32]) {
    load_full<G>(elements_of<G>(grads, place), lane, c);
    if (L2) {
        float p[32];
        load_full_of_type(param_type, params, place, lane, p);
#pragma unroll
        for (int i = 0; i < 32; i++) c[i] = __fadd_rn(c[i], __fmul_rn(l2, p[i]));
    }
}

template <typename G, bool L2, bool MASKED>
__device__ __forceinline__ void encode_momentum_full(
    const Place* places, i64 n, const i64* grads, const u8* momentum, const i64* params, Type param_type, float* residual,
    const u8* mask, u8* out, i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes, bool squared, float beta1, float alpha,
    float l2) {
    int lane = threadIdx.x & 31;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        float* r = residual + (i64)place.block * TILE;
        Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, TILE);
        float c[32], old[32];
        u32 bits = words_at(momentum, slot)[word_of_lane(lane)];
        float m = *scale_at(momentum, slot);
        u32 masked = mask_word<MASKED>(mask, place.block, lane);
        load_full<f32>(r, lane, old);  // before the gradient, whose address takes a look-up
        load_gradient<G, L2>(grads, params, param_type, place, lane, l2, c);
        bits = ~transpose_nibbles(bits, lane);
        float decayed = __fmul_rn(beta1, m);
#pragma unroll
        for (int i = 0; i < 32; i++) c[i] = __fadd_rn(sum_of_two(flipped(decayed, bits, i), alpha, c[i]), old[i]);
        u32 live = live_of_word<MASKED>(masked, lane);
        if (MASKED) clear_masked(c, live);
        finish<MASKED>(c, r, out + slot.words, scale_at(out, slot), squared, lane, live);
    }
}

#define ENCODE(NAME, G, L2, MASKED)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, L2 ? 2 : 3)                                                  \
        NAME(LOCAL_ARGUMENTS, u8* out, SIZE_ARGUMENTS, i64 squared) {                                                  \
        encode_momentum_full<G, L2, MASKED>(places, n, grads, momentum, params, Type(param_type), residual, mask, out, \
            chunk_blocks, bits_bytes, payload_bytes, squared != 0, number(beta1), number(alpha), number(l2));          \
    }
ENCODE(encode_full_f32, f32, false, false)
ENCODE(encode_full_bf16, bf16, false, false)
ENCODE(encode_full_f16, f16, false, false)
ENCODE(encode_full_l2_f32, f32, true, false)
ENCODE(encode_full_l2_bf16, bf16, true, false)
ENCODE(encode_full_l2_f16, f16, true, false)
ENCODE(encode_masked_f32, f32, false, true)
ENCODE(encode_masked_bf16, bf16, false, true)
ENCODE(encode_masked_f16, f16, false, true)
ENCODE(encode_masked_l2_f32, f32, true, true)
ENCODE(encode_masked_l2_bf16, bf16, true, true)
ENCODE(encode_masked_l2_f16, f16, true, true)

// Where a block's numbers are written; `out` has the address of each chunk.
__device__ __forceinline__ float* written(const i64* out, int block, i64 chunk_blocks, i64 block_size) {
    int chunk = block / (int)chunk_blocks;
    return reinterpret_cast<float*>(out[chunk]) + (block - chunk * chunk_blocks) * block_size;
}

template <typename G, bool L2>
__device__ __forceinline__ void write_momentum_full(
    const Place* places, i64 n, const i64* grads, const u8* momentum, const i64* params, Type param_type, const i64* out,
    i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes, float beta1, float alpha, float l2) {
    int lane = threadIdx.x & 31;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, TILE);
        float c[32];
        u32 bits = words_at(momentum, slot)[word_of_lane(lane)];
        float m = *scale_at(momentum, slot);
        load_gradient<G, L2>(grads, params, param_type, place, lane, l2, c);
        bits = ~transpose_nibbles(bits, lane);
        float decayed = __fmul_rn(beta1, m);
        float* target = written(out, place.block, chunk_blocks, TILE) + 4 * lane;
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float four[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                four[k] = sum_of_two(flipped(decayed, bits, 4 * row + k), alpha, c[4 * row + k]);
            store4(target + 128 * row, four[0], four[1], four[2], four[3]);
        }
    }
}

#define WRITE(NAME, G, L2)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, L2 ? 2 : 3)                                                  \
        NAME(LOCAL_ARGUMENTS, const i64* out, SIZE_ARGUMENTS) {                                                        \
        write_momentum_full<G, L2>(places, n, grads, momentum, params, Type(param_type), out, chunk_blocks, bits_bytes, \
            payload_bytes, number(beta1), number(alpha), number(l2));                                                  \
    }
WRITE(write_full_f32, f32, false)
WRITE(write_full_bf16, bf16, false)
WRITE(write_full_f16, f16, false)
WRITE(write_full_l2_f32, f32, true)
WRITE(write_full_l2_bf16, bf16, true)
WRITE(write_full_l2_f16, f16, true)

// 512 elements at a time: with half of the registers, twice as many warps keep as many loads under way.
constexpr int HALF = ROWS / 2;

template <typename P, bool MASTER, bool MASKED>
__device__ __forceinline__ void decode_update_full(
    const Place* places, i64 n, const u8* gathered, u8* momentum, const i64* params, const i64* masters,
    const i64* variances, const u8* mask, const float* scalars, const u8* proceed, i64 chunk_blocks, i64 bits_bytes,
    i64 payload_bytes, float eps) {
    if (proceed != nullptr && *proceed == 0) return;
    int lane = threadIdx.x & 31;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, TILE);
        u32 bits = words_at(gathered, slot)[word_of_lane(lane)];
        float scale = *scale_at(gathered, slot);
        const float* variance = elements_of<f32>(variances, place) + 4 * lane;
        typename P::raw* p = const_cast<typename P::raw*>(elements_of<P>(params, place)) + 4 * lane;
        float* master = MASTER ? const_cast<float*>(elements_of<f32>(masters, place)) + 4 * lane : nullptr;
        const float* row_of = scalars + 3 * place.tensor;
        float rate = row_of[0], root = row_of[1], keep = row_of[2];
        float step = 0.0f;
        bool usual = true;
        u32 live = mask_word<MASKED>(mask, place.block, lane);
#pragma unroll 1
        for (int half = 0; half < 2; half++, bits >>= 4 * HALF, live >>= 4 * HALF) {
            float w[4 * HALF], v[4 * HALF];
#pragma unroll
            for (int row = 0; row < HALF; row++) load4(f32(), variance + 128 * row, v + 4 * row);
#pragma unroll
            for (int row = 0; row < HALF; row++) {
                if (MASTER) load4(f32(), master + 128 * row, w + 4 * row);
                else load4(P(), p + 128 * row, w + 4 * row);
            }
            if (half == 0) {  // only now, for it waits for signs and scale to come
                step = __fmul_rn(rate, scale);
                usual = usual_numerator(step) && usual_factors(root, eps);
                reinterpret_cast<u32*>(momentum + slot.words)[word_of_lane(lane)] = bits;
                if (lane == 0) *scale_at(momentum, slot) = scale;
                bits = ~transpose_nibbles(bits, lane);
                live = live_of_word<MASKED>(live, lane);
            }
            if (MASKED)
#pragma unroll
                for (int i = 0; i < 4 * HALF; i++) v[i] = live >> i & 1 ? v[i] : 1.0f;
            bool all_usual = usual;
#pragma unroll
            for (int i = 0; i < 4 * HALF; i++) all_usual &= usual_variance(v[i]);
            if (__all_sync(ALL, all_usual)) {
#pragma unroll
                for (int i = 0; i < 4 * HALF; i++)
                    v[i] = usual_quotient(step, __fadd_rn(__fmul_rn(usual_root(v[i]), root), eps));
            } else {
#pragma unroll
                for (int i = 0; i < 4 * HALF; i++)
                    v[i] = __fdiv_rn(step, __fadd_rn(__fmul_rn(__fsqrt_rn(v[i]), root), eps));
            }
#pragma unroll
            for (int row = 0; row < HALF; row++) {
                float* four = w + 4 * row;
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    int i = 4 * row + k;
                    four[k] = __fmul_rn(four[k], keep);
                    if (!MASKED || (live >> i & 1)) four[k] = __fsub_rn(four[k], flipped(v[i], bits, i));
                }
                if (MASTER) store4(master + 128 * row, four[0], four[1], four[2], four[3]);
                store4(p + 128 * row, narrow(P(), four[0]), narrow(P(), four[1]), narrow(P(), four[2]), narrow(P(), four[3]));
            }
            variance += 128 * HALF;
            p += 128 * HALF;
            if (MASTER) master += 128 * HALF;
        }
    }
}

#define UPDATE(NAME, P, MASTER, MASKED)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) NAME(UPDATE_ARGUMENTS, SIZE_ARGUMENTS) {                   \
        decode_update_full<P, MASTER, MASKED>(places, n, gathered, momentum, params, masters, variances, mask, scalars, \
            proceed, chunk_blocks, bits_bytes, payload_bytes, number(eps));                                             \
    }
UPDATE(update_full_f32, f32, false, false)
UPDATE(update_full_bf16, bf16, false, false)
UPDATE(update_full_f16, f16, false, false)
UPDATE(update_full_master_f32, f32, true, false)
UPDATE(update_full_master_bf16, bf16, true, false)
UPDATE(update_full_master_f16, f16, true, false)
UPDATE(update_masked_f32, f32, false, true)
UPDATE(update_masked_bf16, bf16, false, true)
UPDATE(update_masked_f16, f16, false, true)
UPDATE(update_masked_master_f32, f32, true, true)
UPDATE(update_masked_master_bf16, bf16, true, true)
UPDATE(update_masked_master_f16, f16, true, true)

// ---- any block

// (β₁·m) + (α·(g + l2·p)) of one block's tiles; momentum from fp32 tensors, or where there are none from payloads.
struct LocalMomentum {
    i64 grad, param, m;
    Type grad_type, param_type;
    i64 offset;
    const u32* words;
    float scale;
    float beta1, alpha, l2;
    int block_size;

    __device__ __forceinline__ void fill(int tile, u32 live, bool whole, int lane, float values[ROWS][4]) const {
        i64 first = offset + (i64)tile * TILE;
        load_any(grad_type, grad, first, live, whole, lane, values);
        if (param != 0) {
            float p[ROWS][4];
            load_any(param_type, param, first, live, whole, lane, p);
#pragma unroll
            for (int i = 0; i < 32; i++)
                values[i / 4][i % 4] = __fadd_rn(values[i / 4][i % 4], __fmul_rn(l2, p[i / 4][i % 4]));
        }
        if (words == nullptr) {
            float old[ROWS][4];
            load_any(F32, m, first, live, whole, lane, old);
#pragma unroll
            for (int i = 0; i < 32; i++)
                values[i / 4][i % 4] = sum_of_two(__fmul_rn(beta1, old[i / 4][i % 4]), alpha, values[i / 4][i % 4]);
        } else {
            int n_words = min(block_size - tile * TILE, TILE) / 32;
            u32 bits = load_bits(reinterpret_cast<const u8*>(words + tile * (TILE / 32)), n_words, lane);
            float decayed = __fmul_rn(beta1, scale);
#pragma unroll
            for (int i = 0; i < 32; i++)
                values[i / 4][i % 4] = sum_of_two(signed_scale(decayed, bits, i), alpha, values[i / 4][i % 4]);
        }
    }
};

#define LOCAL_MOMENTUM(SLOT)                                                                                         \
    LocalMomentum {                                                                                                  \
        address_of(grads, place), address_of(params, place), address_of(momenta, place), Type(grad_type),            \
            Type(param_type), place.offset, momenta == nullptr ? words_at(momentum, SLOT) : nullptr,                 \
            momenta == nullptr ? *scale_at(momentum, SLOT) : 0.0f, number(beta1), number(alpha), number(l2),         \
            int(block_size)                                                                                          \
    }

extern "C" __global__ void __launch_bounds__(THREADS) encode_any(LOCAL_ARGUMENTS, u8* out, Sums* sums, SHAPE_ARGUMENTS) {
    i64 warp = warp_index();
    if (warp >= n) return;
    int lane = threadIdx.x & 31;
    Place place = places[warp];
    Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, block_size);
    LocalMomentum local = LOCAL_MOMENTUM(slot);
    encode_block(
        [&](int tile, u32 live, bool whole, float values[ROWS][4]) { local.fill(tile, live, whole, lane, values); },
        count_of(place, numels, block_size),
        residual + place.block * block_size,
        mask == nullptr ? nullptr : mask + place.block * (block_size / 8),
        out + slot.words,
        scale_at(out, slot),
        sums + place.block,
        SHAPE,
        lane);
}

extern "C" __global__ void __launch_bounds__(THREADS) write_any(LOCAL_ARGUMENTS, const i64* out, SIZE_ARGUMENTS) {
    int lane = threadIdx.x & 31;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, block_size);
        LocalMomentum local = LOCAL_MOMENTUM(slot);
        i64 count = count_of(place, numels, block_size);
        float* target = written(out, place.block, chunk_blocks, block_size);
        for (i64 first = 0; first < count; first += TILE) {
            u32 real = real_bits(count - first, lane);
            float values[ROWS][4];
            local.fill(int(first / TILE), real, count - first >= TILE, lane, values);
            store_tile(f32(), target + first, real, lane, values);
        }
    }
}

// residual <- (residual + sent) - c. Nearly always there is nothing to undo, so a few warps loop over all blocks.
extern "C" __global__ void __launch_bounds__(THREADS)
    undo_any(LOCAL_ARGUMENTS, const u8* sent, const u8* proceed, SIZE_ARGUMENTS) {
    if (proceed != nullptr && *proceed != 0) return;
    int lane = threadIdx.x & 31;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Place place = places[warp];
        Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, block_size);
        LocalMomentum local = LOCAL_MOMENTUM(slot);
        i64 count = count_of(place, numels, block_size);
        float scale = *scale_at(sent, slot);
        if (scale != scale) continue;  // this block has kept its residual
        for (i64 first = 0; first < count; first += TILE) {
            int n_words = min(block_size - first, (i64)TILE) / 32;
            u32 said = load_bits(sent + slot.words + first / 8, n_words, lane);
            u32 live = real_bits(count - first, lane);
            if (mask != nullptr) live &= ~load_bits(mask + place.block * (block_size / 8) + first / 8, n_words, lane);
            float* r = residual + place.block * block_size + first;
            bool whole = count - first >= TILE && vectors_at(r);
            float values[ROWS][4], old[ROWS][4];
            local.fill(int(first / TILE), live, whole, lane, values);
            load_tile(f32(), r, live, whole, lane, old);
#pragma unroll
            for (int i = 0; i < 32; i++) {
                float put_back = __fadd_rn(old[i / 4][i % 4], signed_scale(scale, said, i));
                old[i / 4][i % 4] = __fsub_rn(put_back, values[i / 4][i % 4]);
            }
            store_tile(f32(), r, live, lane, old);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) update_any(UPDATE_ARGUMENTS, SIZE_ARGUMENTS) {
    if (proceed != nullptr && *proceed == 0) return;
    i64 warp = warp_index();
    if (warp >= n) return;
    int lane = threadIdx.x & 31;
    Place place = places[warp];
    Slot slot = slot_of(place.block, chunk_blocks, bits_bytes, payload_bytes, block_size);
    i64 count = count_of(place, numels, block_size);
    i64 param = address_of(params, place), master = address_of(masters, place), variance = address_of(variances, place);
    const float* row_of = scalars + 3 * max(place.tensor, 0);
    float rate = row_of[0], root = row_of[1], keep = row_of[2], floor = number(eps);
    float scale = *scale_at(gathered, slot), step = __fmul_rn(rate, scale);
    if (lane == 0) *scale_at(momentum, slot) = scale;
    for (i64 first = 0; first < block_size; first += TILE) {
        int n_words = min(block_size - first, (i64)TILE) / 32, word = word_of_lane(lane);
        u32 bits = 0;
        if (word < n_words) {
            bits = words_at(gathered, slot)[first / 32 + word];
            reinterpret_cast<u32*>(momentum + slot.words)[first / 32 + word] = bits;
        }
        bits = transpose_nibbles(bits, lane);
        u32 real = real_bits(count - first, lane);
        u32 live = mask == nullptr ? real : real & ~load_bits(mask + place.block * (block_size / 8) + first / 8, n_words, lane);
        bool whole = count - first >= TILE;
        i64 at = place.offset + first;
        float w[ROWS][4], v[ROWS][4];
        load_any(F32, variance, at, live, whole, lane, v);
        if (master != 0) load_any(F32, master, at, real, whole, lane, w);
        else load_any(Type(param_type), param, at, real, whole, lane, w);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float kept = __fmul_rn(w[i / 4][i % 4], keep);
            float d = __fadd_rn(__fmul_rn(__fsqrt_rn(v[i / 4][i % 4]), root), floor);
            float moved = __fsub_rn(kept, __fdiv_rn(signed_scale(step, bits, i), d));
            w[i / 4][i % 4] = live >> i & 1 ? moved : kept;
        }
        if (master != 0) store_any(F32, master, at, real, lane, w);
        store_any(Type(param_type), param, at, real, lane, w);
    }
}

// ---- per tensor

// One thread per tensor: count a step and write rate, root and keep.
extern "C" __global__ void adam_scalars(
    float* steps, const float* variance_steps, i64 k, float* scalars, const void* lr_on_device, i64 lr_is_double,
    i64 lr_bits, i64 beta1, i64 beta2, i64 weight_decay, i64 corrected, const u8* proceed) {
    i64 tensor = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (tensor >= k || (proceed != nullptr && *proceed == 0)) return;
    double lr = __longlong_as_double(lr_bits);
    if (lr_on_device != nullptr)
        lr = lr_is_double ? *static_cast<const double*>(lr_on_device) : double(*static_cast<const float*>(lr_on_device));
    float t = steps[tensor] + 1.0f;
    steps[tensor] = t;
    float* row = scalars + 3 * tensor;
    row[0] = float(lr / correction(__longlong_as_double(beta1), t, corrected != 0));
    row[1] = float(1.0 / sqrt(correction(__longlong_as_double(beta2), variance_steps[tensor], corrected != 0)));
    row[2] = float(1.0 - lr * __longlong_as_double(weight_decay));
}
