"""The operators of `SignCodec` on CUDA tensors, by CuPy."""
