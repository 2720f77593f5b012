// Error feedback of a mean that is not taken, put back; it leaves at once where the device knows that the mean is taken.
#include "block.cuh"

// residual <- (residual + what `sent` says) - the mean of `payloads`; one warp per block. A block that says NaN has left
// its residual as it was.
extern "C" __global__ void __launch_bounds__(THREADS) undo_reduce(
    const u8* payloads, i64 ranks, const Entry* entries, i64 n, float* residual, const u8* mask, const u8* sent,
    const u8* keep, i64 chunk_blocks, i64 bits_bytes, i64 payload_bytes, i64 block_size) {
    if (keep != nullptr && *keep) return;
    int lane = threadIdx.x & 31;
    i64 bytes = block_size / 8;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        Entry entry = entries[warp];
        i64 block = entry.block % chunk_blocks;
        float said = reinterpret_cast<const float*>(sent + bits_bytes)[block];
        if (said != said) continue;
        for (i64 first = 0; first < entry.count; first += TILE) {
            int n_words = min(block_size - first, (i64)TILE) / 32;
            i64 at = block * bytes + first / 8;
            u32 live = real_bits(entry.count - first, lane);
            if (mask != nullptr) live &= ~load_bits(mask + at, n_words, lane);
            float mean[4 * ROWS];
            for (i64 rank = 0; rank < ranks; rank++) {
                const u8* payload = payloads + rank * payload_bytes;
                u32 bits = load_bits(payload + at, n_words, lane);
                float share = __fdiv_rn(reinterpret_cast<const float*>(payload + bits_bytes)[block], float(ranks));
#pragma unroll
                for (int i = 0; i < 4 * ROWS; i++) {
                    float v = signed_scale(share, bits, i);
                    mean[i] = rank == 0 ? v : __fadd_rn(mean[i], v);
                }
            }
            u32 bits = load_bits(sent + at, n_words, lane);
            float* r = residual + block * block_size + first + 4 * lane;
#pragma unroll
            for (int i = 0; i < 4 * ROWS; i++)
                if (live >> i & 1) {
                    float* target = r + 128 * (i / 4) + i % 4;
                    *target = __fsub_rn(__fadd_rn(*target, signed_scale(said, bits, i)), mean[i]);
                }
        }
    }
}
