"""Starts the kernel by which all ranks of a machine write large pieces into each other's memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from onebit.compress.gpu.module import THREADS, launch
from onebit.compress.layout import ceil_div

SOURCE = Path(__file__).with_name("push.cu")
MOST_RANKS = 8  # as in push.cu
UNIT = 16  # bytes that are moved at once; pieces are whole numbers of them
_SIGNALS = 2 * 4 * MOST_RANKS  # bytes per block of threads; as in push.cu
_EACH = 4 * UNIT * THREADS  # bytes that keep a block of threads busy
_MOST_BLOCKS = 64  # of threads, so that most of the device is left to others


class Push:
    """Memory that all ranks of a machine can write to, and writing to all of it; as often on every rank.

    Args:
        memories: where on the device the addresses of every rank's memory are, each of `memory_bytes` zeros at first:
            the output, and signals.
        rank: this rank's place among them.
        ranks: how many there are.
        bytes: of the output, which is a piece from every rank, each a multiple of `UNIT`.
        given_up: (1,) int32 in pinned memory: set by a rank that has waited too long; once set nothing waits long.
        device: the GPU.

    Attributes:
        bytes: as given.
    """

    def __init__(
        self, memories: int, rank: int, ranks: int, bytes: int, given_up: Tensor, device: torch.device
    ) -> None:
        self.bytes = bytes
        self._device = device
        self._piece = bytes // ranks
        self._state = torch.zeros(1 + _MOST_BLOCKS, dtype=torch.int32, device=device)
        self._given_up = given_up
        self._where = (memories, bytes, self._state.data_ptr(), given_up.data_ptr(), ranks, rank)

    def __call__(self, input: Tensor, limit: float, stream: torch.cuda.Stream | None = None) -> None:
        """Queue it.

        Args:
            input: contiguous, any dtype, at a multiple of `UNIT`: a piece for every rank, or one, the same for all.
            limit: seconds that it may take.
            stream: where; None: on the current one.
        """
        units = self._piece // UNIT
        stride = 0 if input.nbytes == self._piece else units
        threads = THREADS * min(ceil_div(self._piece, _EACH), _MOST_BLOCKS)
        arguments = (input.data_ptr(), units, stride, *self._where, int(1e9 * limit))
        handle = None if stream is None else stream.cuda_stream
        launch(SOURCE, "push", self._device, threads, *arguments, stream=handle)


def memory_bytes(bytes: int) -> int:
    """Size of a rank's memory for an output of so many bytes."""
    return bytes + _MOST_BLOCKS * _SIGNALS
