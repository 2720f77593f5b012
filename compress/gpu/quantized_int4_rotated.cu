// The kernels of Int4Codec with a rotation.
#include "quantized_kernels.cuh"

QUANTIZED_KERNELS(Int4, true)
