// The kernels of Fp8Codec.
#include "quantized_kernels.cuh"

QUANTIZED_KERNELS(Fp8, false)
