// The bias that a moment has because it started at 0.
#pragma once

// 1 - beta^t, 1 without bias correction.
__device__ __forceinline__ double correction(double beta, float t, bool corrected) {
    return corrected ? 1.0 - pow(beta, double(t)) : 1.0;
}
