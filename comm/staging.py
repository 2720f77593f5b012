"""Host copies of device tensors, for a transport that reads and writes host memory alone."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """Lends pinned host memory for the time of one collective; a CPU tensor is its own host memory.

    PyTorch keeps pinned memory that is given back, and lends it again only after the copies that used it are over.
    """

    def needed(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies elsewhere than in host memory."""
        return tensor.is_cuda

    def filled(self, tensor: Tensor) -> Tensor:
        """Host memory with what the current stream has left in `tensor`, complete on return; it may be the tensor."""
        if not self.needed(tensor):
            return tensor
        host = self.blank(tensor).copy_(tensor.detach(), non_blocking=True)
        settle(tensor)
        return host

    def blank(self, tensor: Tensor) -> Tensor:
        """Host memory for what `tensor` will hold; it may be the tensor itself."""
        if not self.needed(tensor):
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def deliver(self, host: Tensor, tensor: Tensor) -> None:
        """Copy from host memory to `tensor`, for work queued on the current stream from now on."""
        if host is not tensor:
            tensor.detach().copy_(host, non_blocking=True)


def settle(tensor: Tensor) -> None:
    """Wait until the current stream's work on a device tensor is over, for who reads it without a stream."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
