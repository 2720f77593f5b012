// Moves a piece from every rank to every rank of one machine, by writes straight to where the others want it, in one
// launch.
//
// Each block of threads moves its share of every piece, together with the blocks of the same number on the other ranks:
// it tells them that its rank's output may be written, waits until they have told the same, writes, and tells them that
// all is there. What a kernel finds after this one is therefore whole. (The two signals are those of NCCL's protocol
// for large messages, "Simple".)
#include "patience.cuh"

constexpr int MOST_RANKS = 8;   // as in push.py
constexpr int AT_ONCE = 4;      // loads under way per thread
constexpr u32 WITHDRAWN = ALL;  // in the place of a number: this rank has given up

// What the others of one number tell a block: one word from each rank that its output may be written, another that it
// has written here.
struct Signals {
    volatile u32 ready[MOST_RANKS];
    volatile u32 written[MOST_RANKS];
};

__device__ __forceinline__ bool heard(const volatile u32& signal, u32 number, Patience patience) {
    u32 seen = 0;
    bool came = wait_until([&] { seen = signal; return seen == number || seen == WITHDRAWN; }, patience);
    if (!came || seen == number) return came;
    *patience.given_up = 1;
    *patience.told = 1;
    return false;
}

// This thread's share of a piece.
__device__ __forceinline__ void move(uint4* to, const uint4* from, i64 units) {
    i64 step = (i64)gridDim.x * THREADS;
    for (i64 first = (i64)blockIdx.x * THREADS + threadIdx.x; first < units; first += AT_ONCE * step) {
        uint4 held[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            if (first + k * step < units) held[k] = from[first + k * step];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            if (first + k * step < units) to[first + k * step] = held[k];
    }
}

// Piece r of `input`, of `units` uint4 at r * stride, goes to rank r; piece r of the output comes from there. memories[r]:
// the output of rank r, and at `signals_at` bytes its Signals, one for each block. state[0] is set when a peer has kept this
// rank waiting for `limit` nanoseconds, and *told, in host memory; the words after it count launches, for each block. A
// piece of which anything is missing is all set bits, so that its scales say NaN. Whose piece is missing is told, and then
// writes nothing more here.
extern "C" __global__ void __launch_bounds__(THREADS) push(
    const uint4* input, i64 units, i64 stride, u8* const* memories, i64 signals_at, int* state, int* told, i64 ranks,
    i64 rank, i64 limit) {
    Patience patience{state, told, (u64)limit};
    u32 number = (u32)state[1 + blockIdx.x] + 1;
    int other = threadIdx.x;
    bool speaks = other < ranks;
    uint4* output = reinterpret_cast<uint4*>(memories[rank]);
    Signals* mine = reinterpret_cast<Signals*>(memories[rank] + signals_at) + blockIdx.x;
    Signals* theirs = reinterpret_cast<Signals*>(memories[speaks ? other : rank] + signals_at) + blockIdx.x;

    bool here = !speaks;
    if (speaks && !*patience.given_up) {
        theirs->ready[rank] = number;
        here = heard(mine->ready[other], number, patience);
    }
    if (__syncthreads_and(here)) {
        for (int i = 1; i <= ranks; i++) {  // each begins with another rank, and ends with itself
            int r = int((rank + i) % ranks);
            move(reinterpret_cast<uint4*>(memories[r]) + rank * units, input + r * stride, units);
        }
        __syncthreads();
        if (speaks) {
            __threadfence_system();  // what all threads of the block have written goes before the signal
            theirs->written[rank] = number;
            here = heard(mine->written[other], number, patience);
            __threadfence_system();
        }
    } else {
        here = !speaks;
    }
    if (!here) theirs->ready[rank] = WITHDRAWN;

    __shared__ bool missing[MOST_RANKS];
    if (speaks) missing[other] = !here;
    __syncthreads();
    for (int r = 0; r < ranks; r++)
        if (missing[r])
            for (i64 i = threadIdx.x; i < units; i += THREADS) output[r * units + i] = make_uint4(ALL, ALL, ALL, ALL);
    if (threadIdx.x == 0) state[1 + blockIdx.x] = (int)number;
}
