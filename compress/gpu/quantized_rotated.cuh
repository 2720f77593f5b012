// Decoding of rotated blocks of 1024 real elements at aligned addresses. Codes are integers, so the sums of the transform
// are exact in any order, and tensor cores take eight of its ten doublings.
//
// The ten bits of a number's place in its block say where it stands in four matrices X of 16 by 16, lowest bits first:
//   rows by bits 1, 3, 5, 6, columns by bits 7, 2, 4, 8, and bits 0 and 9 tell which of the four.
// With the transform of 16 as a matrix H, H·X·H has those doublings done; rows of this product stand for bits 3, 5, 6, 1.
// Lane (g, t) holds X as two B side by side and H·X·H as two products, see tensor_cores.cuh. The bits are dealt so that it
// holds four neighbours wherever it loads codes or stores elements, and neighbouring lanes the next four.
#pragma once
#include "quantized_full.cuh"
#include "tensor_cores.cuh"

constexpr float ROOT = 0.03125f;  // 1 / sqrt(1024)

// Neighbours 0 and 2, and neighbours 1 and 3, of four codes as fp16: a byte or nibble is put into a number from 1024 on,
// where the steps of fp16 are 1, then what it has too much is taken away.
__device__ __forceinline__ void pairs_of(Int8, u32 codes, u32 pairs[2]) {
    codes ^= 0x80808080u;
    pairs[0] = subtract_pairs(__byte_perm(codes, 0x64646464u, 0x4240), 0x64806480u);  // 1024 + 128
    pairs[1] = subtract_pairs(__byte_perm(codes, 0x64646464u, 0x4341), 0x64806480u);
}
__device__ __forceinline__ void pairs_of(Int4, u16 codes, u32 pairs[2]) {
    u32 bytes = __byte_perm(codes ^ 0x8888u, 0x64646464u, 0x4140);
    pairs[0] = subtract_pairs(bytes & 0xFF0FFF0Fu, 0x64086408u);                   // 1024 + 8
    pairs[1] = multiply_add_pairs(bytes & 0xFFF0FFF0u, 0x2C002C00u, 0xD480D480u);  // / 16, then -(64 + 8)
}

__device__ __forceinline__ u32 signs(u32 bits, u32 which) { return __popc(bits) & 1 ? which : 0; }

// What a lane holds of H, on the left of X and on the right of H·X.
struct Transform {
    u32 left[4];
    u32 right;
    __device__ __forceinline__ explicit Transform(int lane) {
        u32 g = lane / 4, t = lane % 4;
        left[0] = ONES ^ signs(g & t, BOTH);
        left[1] = left[0] ^ SECOND;
        left[2] = left[0] ^ signs(g & 4, BOTH);
        left[3] = left[1] ^ signs(g & 4, BOTH);
        right = ONES ^ signs(g >> 1 & t, BOTH) ^ signs(g & 1, SECOND);
    }
};

// sums[2 · bit 9 + bit 0][bit 8][2 · bit 1 + bit 7] <- the transform of 1024 codes, loaded as rows[bit 9][bit 8][bit 6].
template <typename F>
__device__ __forceinline__ void transform(
    const typename F::row rows[2][2][2], const Transform& hadamard, float sums[4][2][4]) {
#pragma unroll
    for (int high = 0; high < 2; high++) {
        u32 pairs[2][2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) pairs_of(F(), rows[high][i / 2][i % 2], pairs[i / 2][i % 2]);
#pragma unroll
        for (int low = 0; low < 2; low++) {
            u32 half[4];
#pragma unroll
            for (int side = 0; side < 2; side++)
                multiply(hadamard.left, pairs[side][0][low], pairs[side][1][low], half + 2 * side);
#pragma unroll
            for (int side = 0; side < 2; side++)
                multiply(half, hadamard.right, hadamard.right ^ (side ? BOTH : 0), sums[2 * high + low][side]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float *a = &sums[0][i / 4][i % 4], *b = &sums[1][i / 4][i % 4];
        float *c = &sums[2][i / 4][i % 4], *d = &sums[3][i / 4][i % 4];
        butterfly(*a, *b);
        butterfly(*c, *d);
        butterfly(*a, *c);
        butterfly(*b, *d);
    }
}

// Launched with half as many warps as blocks: while one is written, the compiler has the next one's codes on the way.
template <typename F, typename T>
__device__ __forceinline__ void decode_rotated(const u8* payloads, const Entry* entries, i64 n, const Sizes& sizes) {
    int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    // A lane's first number: bits 3, 5, 7, 2, 4 of those it loads, bits 2, 4, 3, 5, 6 of those it stores.
    int source = (t & 1) << 3 | (t & 2) << 4 | (g & 1) << 7 | (g & 2) << 1 | (g & 4) << 2;
    int target = (t & 1) << 2 | (t & 2) << 3 | (g & 1) << 3 | (g & 2) << 4 | (g & 4) << 4;
    Transform hadamard(lane);
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Entry entry = entries[warp];
        Place place = place_of(entry.block, sizes);
        const u8* payload = payloads + place.payload;
        float scale = scales_at(payload, sizes)[place.index];
        const typename F::row* codes = rows_at<F>(payload + place.index * code_bytes<F>(TILE)) + source / 4;
        typename F::row rows[2][2][2];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int high = i / 4, side = i / 2 % 2, below = i % 2;
            rows[high][side][below] = codes[(512 * high + 256 * side + 64 * below) / 4];
        }
        float sums[4][2][4], step = __fmul_rn(scale, ROOT);
        transform<F>(rows, hadamard, sums);
        typename T::raw* x = reinterpret_cast<typename T::raw*>(entry.address) + target;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int high = i / 4, side = i / 2 % 2, column = i % 2;
            float v[4];
#pragma unroll
            for (int k = 0; k < 4; k++) v[k] = __fmul_rn(sums[2 * high + k % 2][side][2 * (k / 2) + column], step);
            store_known(T(), x + 512 * high + 256 * side + 128 * column, v, scale);
        }
    }
}
