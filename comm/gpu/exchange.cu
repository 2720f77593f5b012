// Moves a piece from every rank to every rank of one machine, by writes into each other's memory, in one launch.
//
// Every rank has a mailbox that all can write to, with two places per sender. Bytes travel in lines of 16: eight of them,
// and after each four the number of the exchange, so that who sees the number has the bytes, and nobody has to be told
// that they are there. Exchanges take the two places in turns: who is one ahead disturbs nobody, and nobody can be two
// ahead, for in between each waits for all others. (The lines are those of NCCL's protocol for small messages, "LL".)
#include "patience.cuh"

constexpr int MOST_RANKS = 8;  // as in exchange.py
constexpr int UNIT = 8;        // bytes of a piece in a line

__device__ __forceinline__ void send(uint4* line, u64 unit, u32 number) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(line), "r"((u32)unit), "r"(number),
                 "r"((u32)(unit >> 32))
                 : "memory");
}

// Whether both halves of the line are of this exchange; the unit in it.
__device__ __forceinline__ bool came(const uint4* line, u32 number, u64& unit) {
    uint4 seen;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(seen.x), "=r"(seen.y), "=r"(seen.z), "=r"(seen.w)
                 : "l"(line)
                 : "memory");
    unit = seen.x | (u64)seen.z << 32;
    return seen.y == number && seen.w == number;
}

// The unit that a line brings; all bits set, so that scales say NaN, once this rank has given up.
__device__ __forceinline__ u64 receive(const uint4* line, u32 number, Patience patience) {
    u64 unit;
    return wait_until([&] { return came(line, number, unit); }, patience) ? unit : ~0ull;
}

// A unit of a piece, of which `count` bytes are the piece's; `whole`: it can be loaded and stored at once.
__device__ __forceinline__ u64 load(const u8* at, int count, bool whole) {
    if (whole) return *(const u64*)at;
    u64 unit = 0;
    for (int i = 0; i < count; ++i) unit |= (u64)at[i] << (8 * i);
    return unit;
}

__device__ __forceinline__ void store(u8* at, u64 unit, int count, bool whole) {
    if (whole) {
        *(u64*)at = unit;
        return;
    }
    for (int i = 0; i < count; ++i) at[i] = (u8)(unit >> (8 * i));
}

// Piece r of `input`, of `bytes` at r * stride, goes to rank r; piece r of `output` comes from there. state[0] is set when a
// peer has kept this rank waiting for `limit` nanoseconds, and *told, in host memory; the words after it count exchanges,
// for each thread block.
extern "C" __global__ void __launch_bounds__(THREADS) exchange(
    const u8* input, u8* output, i64 bytes, i64 stride, uint4* const* mailboxes, int* state, int* told, i64 ranks,
    i64 rank, i64 limit) {
    Patience patience{state, told, (u64)limit};
    u32 number = (u32)state[1 + blockIdx.x] + 1;
    i64 lines = (bytes + UNIT - 1) / UNIT, turn = (number & 1) * ranks * lines;
    bool aligned = (((i64)input | (i64)output | bytes | stride) & (UNIT - 1)) == 0;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < lines; i += (i64)gridDim.x * THREADS) {
        int count = (int)min(bytes - i * UNIT, (i64)UNIT);
        u64 units[MOST_RANKS];
#pragma unroll
        for (int r = 0; r < MOST_RANKS; ++r)
            if (r < ranks) units[r] = load(input + r * stride + i * UNIT, count, aligned);
#pragma unroll
        for (int r = 0; r < MOST_RANKS; ++r)
            if (r < ranks) send(mailboxes[r] + turn + rank * lines + i, units[r], number);
        const uint4* come = mailboxes[rank] + turn + i;
#pragma unroll 1
        for (int r = 0; r < ranks; ++r)
            store(output + r * bytes + i * UNIT, receive(come + r * lines, number, patience), count, aligned);
    }
    __syncthreads();  // all have read the number
    if (threadIdx.x == 0) state[1 + blockIdx.x] = (int)number;
}
