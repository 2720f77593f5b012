// The kernels of Int8Codec without a rotation.
#include "quantized_kernels.cuh"

QUANTIZED_KERNELS(Int8, false)
