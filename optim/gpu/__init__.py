"""CUDA kernels of optimizer steps, by CuPy."""
