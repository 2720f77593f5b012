"""The optimizers' kernels for CPU tensors, by Numba."""
