// The kernels of Int8Codec with a rotation.
#include "quantized_kernels.cuh"

QUANTIZED_KERNELS(Int8, true)
