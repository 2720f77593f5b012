// Waiting for another GPU of the machine, with an end to it.
#pragma once
#include "block.cuh"

typedef unsigned long long u64;

constexpr int POLLS = 64;      // between two looks at the clock
constexpr u64 LOOK = 10000000; // nanoseconds between two looks at memory of the host, which thousands of threads would jam

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// Whether this rank still waits for others. The device's flag is for the kernels to come, the host's for who looks there.
struct Patience {
    volatile int *given_up, *told;
    u64 limit;  // nanoseconds
};

// Ask `came` until it says so; false once this rank has given up.
template <typename Came>
__device__ __forceinline__ bool wait_until(Came came, Patience patience) {
    u64 start = nanoseconds(), look = LOOK;
    while (true) {
        for (int i = 0; i < POLLS; ++i)
            if (came()) return true;
        u64 waited = nanoseconds() - start;
        if (waited > patience.limit) *patience.told = 1;
        if (waited > look || waited > patience.limit) {
            look += LOOK;
            if (*patience.told) *patience.given_up = 1;
        }
        if (*patience.given_up) return false;
    }
}
