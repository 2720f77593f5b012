// The kernels of Int4Codec without a rotation.
#include "quantized_kernels.cuh"

QUANTIZED_KERNELS(Int4, false)
