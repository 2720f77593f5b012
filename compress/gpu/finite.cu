// Whether all scales of a set of payloads are finite, in one launch.
#include "block.cuh"

struct __align__(16) Scales {  // of one payload
    const float* first;
    i64 count;
};

// `parts` thread blocks look at one payload's scales. *finite is set before the launch.
extern "C" __global__ void __launch_bounds__(THREADS) all_finite(const Scales* payloads, i64 parts, u8* finite) {
    Scales scales = payloads[blockIdx.x / parts];
    bool bad = false;
    for (i64 i = blockIdx.x % parts * THREADS + threadIdx.x; i < scales.count; i += parts * THREADS)
        bad |= !isfinite(scales.first[i]);
    if (bad) *finite = 0;
}
