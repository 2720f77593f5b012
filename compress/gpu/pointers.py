"""A table of tensor addresses on a device, sent again only when an address has changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Pointers:
    """The addresses of a list of tensors, (k,) int64 on a device, where kernels look up what they read and write.

    The table keeps its own address, so a captured CUDA graph may refer to it. Sending is ordered on the current stream
    and the host does not wait: kernels launched before it see the old addresses, kernels launched after it the new.

    Args:
        k: number of tensors.
        device: where the table is kept; a table on the CPU is an ordinary tensor.

    Attributes:
        table: (k,) int64; 0 stands for None.
        address: of the table.
    """

    def __init__(self, k: int, device: torch.device | str) -> None:
        self.table = torch.zeros(k, dtype=torch.int64, device=device)
        self.address = self.table.data_ptr()
        self._sent: Sequence[int] = [0] * k
        self._spare: Tensor | None = self._host(self._sent)  # for a capture, in which nothing should be pinned
        self._captured: list[Tensor] = []  # what the replays of graphs read

    def update(self, tensors: Sequence[Tensor | None]) -> bool:
        """`send` the addresses of tensors, (k,)."""
        return self.send([0 if t is None else t.data_ptr() for t in tensors])

    def send(self, addresses: Sequence[int]) -> bool:
        """Make the table that of `addresses`, (k,), or other words of 64 bits; returns whether it was sent.

        The caller does not change the list afterwards; the same list once more is known to be the same addresses.

        Under capture it is always sent, so that a replay finds the addresses it was captured with, whatever eager
        calls have sent meanwhile; after a capture every eager call sends it too.
        """
        capturing = self.table.is_cuda and torch.cuda.is_current_stream_capturing()
        same = addresses is self._sent or addresses == self._sent
        if same and not capturing and not self._captured:
            return False
        self._sent = addresses
        if capturing and self._spare is not None:
            host, self._spare = self._spare.copy_(torch.tensor(addresses, dtype=torch.int64)), None
        else:
            host = self._host(addresses)
        if capturing:
            self._captured.append(host)
        elif self._spare is None:
            self._spare = self._host(addresses)
        self.table.copy_(host, non_blocking=True)
        return True

    def _host(self, addresses: Sequence[int]) -> Tensor:
        values = torch.from_numpy(np.array(addresses, np.int64))  # of a list in a third of the time of torch.tensor
        return values.pin_memory() if self.table.is_cuda else values
