// The quantizing codecs on blocks of any size and fill, at any address, masked or not; one warp per block. A block that is
// rotated is held as a whole, up to 4096 elements; any other is visited a tile at a time.
#pragma once
#include "any.cuh"
#include "hadamard.cuh"
#include "quantized_formats.cuh"
#include "quantized_places.cuh"

// A stretch of a block that is worked on at once: TILES tiles from the `first`th on, as far as the block has them.
template <int TILES>
struct Span {
    int first;
    int tiles;
    int count;  // of real elements in it
    int size;   // of elements in it, those behind the last real one included
    u32 real[TILES];
    u32 live[TILES];
};

template <int TILES>
__device__ __forceinline__ Span<TILES> span_of(int first, int count, const u8* mask, int block_size, int lane) {
    Span<TILES> span;
    span.first = first;
    span.size = min(block_size - first * TILE, TILES * TILE);
    span.tiles = (span.size + TILE - 1) / TILE;
    span.count = min(max(count - first * TILE, 0), span.size);
#pragma unroll 1
    for (int tile = 0; tile < TILES && tile < span.tiles; tile++) {
        u32 real = real_bits(span.count - tile * TILE, lane), live = real;
        if (mask != nullptr) {
            int n_words = min(span.size - tile * TILE, TILE) / 32;
            live &= ~load_bits(mask + (first + tile) * (TILE / 8), n_words, lane);
        }
        span.real[tile] = real;
        span.live[tile] = live;
    }
    return span;
}

// A lane's row of codes lies within its block or beyond it as a whole.
__device__ __forceinline__ bool in_block(int tile, int row, int lane, int block_size) {
    return tile * TILE + 128 * row + 4 * lane < block_size;
}

// The codes of a tile, 0 beyond the block.
template <typename F>
__device__ __forceinline__ void load_codes(const u8* codes, typename F::row rows[ROWS], int tile, int block_size, int lane) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        bool inside = in_block(tile, row, lane, block_size);
        rows[row] = inside ? rows_at<F>(codes)[32 * (ROWS * tile + row) + lane] : 0;
    }
}

// v <- the sum over ranks of their codes' numbers times share(rank), `stride` bytes from one rank's codes to the next.
template <typename F, int TILES, typename Share>
__device__ __forceinline__ void sum_of(
    const u8* codes, Share share_of, int ranks, i64 stride, const Span<TILES>& span, int block_size, int lane,
    float v[TILES][ROWS][4]) {
#pragma unroll 1
    for (int tile = 0; tile < TILES && tile < span.tiles; tile++)
        for (int rank = 0; rank < ranks; rank++) {
            float share = share_of(rank);
            typename F::row rows[ROWS];
            load_codes<F>(codes + rank * stride, rows, span.first + tile, block_size, lane);
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                if (rank == 0)
                    values_of<F>(rows[row], share, v[tile][row]);
                else
                    add_values_of<F>(rows[row], share, v[tile][row]);
            }
        }
}

// v <- the mean over ranks of what their payloads say.
template <typename F, bool ROTATE, int TILES>
__device__ __forceinline__ void mean_of(
    const u8* codes, const float* scales, int ranks, i64 stride, const Span<TILES>& span, int block_size, int lane,
    float v[TILES][ROWS][4]) {
    auto share = [&](int rank) { return __fdiv_rn(scales[rank * (stride / 4)], float(ranks)); };
    sum_of<F, TILES>(codes, share, ranks, stride, span, block_size, lane, v);
    if (ROTATE) hadamard<TILES>(v, block_size, lane);
}

// v <- what one payload says.
template <typename F, bool ROTATE, int TILES>
__device__ __forceinline__ void said_of(
    const u8* codes, float scale, const Span<TILES>& span, int block_size, int lane, float v[TILES][ROWS][4]) {
    sum_of<F, TILES>(codes, [&](int) { return ROTATE ? 1.0f : scale; }, 1, 0, span, block_size, lane, v);
    if (ROTATE) hadamard<TILES>(v, block_size, lane, scale);
}

// Everything but where the values come from: `fill(span, v)` gives those of a span before the residual.
template <typename F, bool ROTATE, int TILES, typename Fill>
__device__ __forceinline__ void encode_spans(
    Fill fill, int count, float* residual, const u8* mask, u8* codes, float* scale, int block_size, Rounding rounding,
    int lane) {
    int tiles = (block_size + TILE - 1) / TILE;
    bool vectors = residual == nullptr || aligned16(residual);
    Span<TILES> span;
    float c[TILES][ROWS][4], v[TILES][ROWS][4];

    auto load = [&](int first) {
        span = span_of<TILES>(first, count, mask, block_size, lane);
        fill(span, c);
#pragma unroll 1
        for (int tile = 0; tile < TILES && tile < span.tiles; tile++) {
            bool whole = span.count >= (tile + 1) * TILE && vectors;
            float* r = residual == nullptr ? nullptr : residual + (first + tile) * TILE;
            add_residual(c[tile], r, span.live[tile], whole, lane);
#pragma unroll
            for (int i = 0; i < 4 * ROWS; i++) v[tile][i / 4][i % 4] = c[tile][i / 4][i % 4];
        }
        if (ROTATE) hadamard<TILES>(v, block_size, lane);
    };

    u32 most = 0;
    for (int first = 0; first < tiles; first += TILES) {
        load(first);
#pragma unroll 1
        for (int tile = 0; tile < TILES && tile < span.tiles; tile++) most = max(most, largest_of(v[tile]));
    }
    most = __reduce_max_sync(ALL, most);
    Steps steps = steps_of<F, ROTATE>(most);
    if (lane == 0) *scale = steps.scale;
    for (int first = 0; first < tiles; first += TILES) {
        if (tiles > TILES) load(first);
#pragma unroll 1
        for (int tile = 0; tile < TILES && tile < span.tiles; tile++) {
            typename F::row rows[ROWS];
            quantize<F>(v[tile], rows, steps, most, rounding, (first + tile) * TILE, lane);
#pragma unroll
            for (int row = 0; row < ROWS; row++)
                if (in_block(first + tile, row, lane, block_size))
                    rows_at<F>(codes)[32 * (ROWS * (first + tile) + row) + lane] = rows[row];
#pragma unroll
            for (int row = 0; row < ROWS; row++) values_of<F>(rows[row], ROTATE ? 1.0f : steps.scale, v[tile][row]);
        }
        if (residual == nullptr || is_broken<ROTATE>(most)) continue;
        if (ROTATE) hadamard<TILES>(v, block_size, lane, steps.scale);
#pragma unroll 1
        for (int tile = 0; tile < TILES && tile < span.tiles; tile++) {
            float* r = residual + (first + tile) * TILE + 4 * lane;
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                float rest[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    bool live = span.live[tile] >> (4 * row + k) & 1;
                    rest[k] = live ? __fsub_rn(c[tile][row][k], v[tile][row][k]) : 0.0f;
                }
                store_real(r + 128 * row, rest, span.real[tile] >> (4 * row) & 0xF, vectors);
            }
        }
    }
}

template <typename F, bool ROTATE, int TILES, typename T>
__device__ __forceinline__ void encode_any(
    const Entry* entries, i64 n, float* residual, const u8* mask, u8* out, const Sizes& sizes, int block_size,
    Rounding rounding) {
    if (warp_index() >= n) return;
    int lane = threadIdx.x & 31;
    Entry entry = entries[warp_index()];
    const typename T::raw* x = reinterpret_cast<const typename T::raw*>(entry.address);
    bool vectors = vectors_at(x);
    Place place = place_of(entry.block, sizes);
    u8* payload = out + place.payload;
    encode_spans<F, ROTATE, TILES>(
        [&](const Span<TILES>& span, float v[TILES][ROWS][4]) {
#pragma unroll 1
            for (int tile = 0; tile < TILES && tile < span.tiles; tile++) {
                bool whole = span.count >= (tile + 1) * TILE && vectors;
                load_tile(T(), x + (span.first + tile) * TILE, span.live[tile], whole, lane, v[tile]);
            }
        },
        entry.count,
        residual == nullptr ? nullptr : residual + (i64)entry.block * block_size,
        mask == nullptr ? nullptr : mask + (i64)entry.block * (block_size / 8),
        payload + place.index * code_bytes<F>(block_size),
        scales_at(payload, sizes) + place.index,
        block_size,
        rounding,
        lane);
}

template <typename F, bool ROTATE, int TILES>
__device__ __forceinline__ void reduce_encode_any(
    const u8* payloads, i64 ranks, const Entry* entries, i64 n, float* residual, const u8* mask, u8* out,
    const Sizes& sizes, int block_size, Rounding rounding) {
    if (warp_index() >= n) return;
    int lane = threadIdx.x & 31;
    Entry entry = entries[warp_index()];
    i64 block = entry.block % (int)sizes.chunk_blocks;
    i64 at = block * code_bytes<F>(block_size);
    encode_spans<F, ROTATE, TILES>(
        [&](const Span<TILES>& span, float v[TILES][ROWS][4]) {
            const float* scale = scales_at(payloads, sizes) + block;
            mean_of<F, ROTATE, TILES>(payloads + at, scale, (int)ranks, sizes.payload_bytes, span, block_size, lane, v);
        },
        entry.count,
        residual == nullptr ? nullptr : residual + block * block_size,
        mask == nullptr ? nullptr : mask + block * (block_size / 8),
        out + at,
        scales_at(out, sizes) + block,
        block_size,
        rounding,
        lane);
}

template <typename F, bool ROTATE, int TILES, typename T>
__device__ __forceinline__ void decode_any(
    const u8* payloads, const Entry* entries, i64 n, const u8* mask, const Sizes& sizes, int block_size) {
    if (warp_index() >= n) return;
    int lane = threadIdx.x & 31;
    Entry entry = entries[warp_index()];
    typedef typename T::raw raw;
    raw* x = reinterpret_cast<raw*>(entry.address);
    bool vectors = vectors_at(x);
    Place place = place_of(entry.block, sizes);
    const u8* payload = payloads + place.payload;
    const u8* codes = payload + place.index * code_bytes<F>(block_size);
    float scale = scales_at(payload, sizes)[place.index];
    if (mask != nullptr) mask += (i64)entry.block * (block_size / 8);
    for (int first = 0; first * TILE < entry.count; first += TILES) {
        Span<TILES> span = span_of<TILES>(first, entry.count, mask, block_size, lane);
        float v[TILES][ROWS][4];
        said_of<F, ROTATE, TILES>(codes, scale, span, block_size, lane, v);
#pragma unroll 1
        for (int tile = 0; tile < TILES && tile < span.tiles; tile++) {
            raw* target = x + (first + tile) * TILE + 4 * lane;
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                raw w[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    bool live = span.live[tile] >> (4 * row + k) & 1;
                    w[k] = narrow(T(), live ? known(v[tile][row][k], scale) : 0.0f);
                }
                store_real(target + 128 * row, w, span.real[tile] >> (4 * row) & 0xF, vectors);
            }
        }
    }
}

// residual <- (residual + what `sent` says) - the mean of `payloads`; a block that says NaN has left it as it was.
template <typename F, bool ROTATE, int TILES>
__device__ __forceinline__ void undo_reduce_any(
    const u8* payloads, i64 ranks, const Entry* entries, i64 n, float* residual, const u8* mask, const u8* sent,
    const Sizes& sizes, int block_size) {
    int lane = threadIdx.x & 31;
    for (i64 warp = warp_index(); warp < n; warp += all_warps()) {
        int count = entries[warp].count;
        i64 block = entries[warp].block % (int)sizes.chunk_blocks;
        i64 at = block * code_bytes<F>(block_size);
        const float* scales = scales_at(payloads, sizes) + block;
        float scale = scales_at(sent, sizes)[block];
        if (scale != scale) continue;
        const u8* masked = mask == nullptr ? nullptr : mask + block * (block_size / 8);
        for (int first = 0; first * TILE < count; first += TILES) {
            Span<TILES> span = span_of<TILES>(first, count, masked, block_size, lane);
            float mean[TILES][ROWS][4], said[TILES][ROWS][4];
            mean_of<F, ROTATE, TILES>(payloads + at, scales, (int)ranks, sizes.payload_bytes, span, block_size, lane, mean);
            said_of<F, ROTATE, TILES>(sent + at, scale, span, block_size, lane, said);
#pragma unroll 1
            for (int tile = 0; tile < TILES && tile < span.tiles; tile++) {
                float* r = residual + block * block_size + (first + tile) * TILE + 4 * lane;
#pragma unroll
                for (int i = 0; i < 4 * ROWS; i++)
                    if (span.live[tile] >> i & 1) {
                        float* target = r + 128 * (i / 4) + i % 4;
                        *target = __fsub_rn(__fadd_rn(*target, said[tile][i / 4][i % 4]), mean[tile][i / 4][i % 4]);
                    }
            }
        }
    }
}
