"""The operators of `SignCodec` on CPU tensors, by Numba."""
