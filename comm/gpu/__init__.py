"""The CUDA kernel that moves bytes between GPUs of one machine."""
