"""Starts the kernel by which all ranks of a machine send each other pieces, through memory that all can write to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from onebit.compress.gpu.module import THREADS, launch
from onebit.compress.layout import ceil_div

SOURCE = Path(__file__).with_name("exchange.cu")
MOST_RANKS = 8  # as in exchange.cu

_UNIT = 8  # bytes of a piece in a line of a mailbox; as in exchange.cu
_LINE = 16  # bytes
_MOST_BLOCKS = 64  # of threads, so that most of the device is left to others


class Exchange:
    """An exchange of pieces of one size, to be made any number of times, as often on every rank.

    Args:
        mailboxes: where on the device the addresses of all mailboxes are, each of `mailbox_bytes` zeros at first.
        rank: this rank's place among them.
        ranks: how many there are.
        bytes: of a piece.
        pieces: how many a rank gives: one for each rank, or 1, the same for all.
        given_up: (1,) int32 in pinned memory: set by a rank that has waited too long; once set nothing waits long.
        device: whose current stream the kernels are queued on.
    """

    def __init__(
        self, mailboxes: int, rank: int, ranks: int, bytes: int, pieces: int, given_up: Tensor, device: torch.device
    ) -> None:
        self._device = device
        self._threads = min(ceil_div(bytes, _UNIT), _MOST_BLOCKS * THREADS)
        self._state = torch.zeros(1 + _MOST_BLOCKS, dtype=torch.int32, device=device)
        self._given_up = given_up
        sizes = (bytes, bytes if pieces > 1 else 0)
        self._arguments = (*sizes, mailboxes, self._state.data_ptr(), given_up.data_ptr(), ranks, rank)

    def __call__(self, output: Tensor, input: Tensor, limit: float) -> None:
        """Queue it.

        Args:
            output: ranks · bytes, contiguous, any dtype: from every rank a piece. All bits are set where one has not
                come in time.
            input: pieces · bytes, contiguous, any dtype; must not overlap `output`.
            limit: seconds that it may take.
        """
        buffers = (input.data_ptr(), output.data_ptr())
        launch(SOURCE, "exchange", self._device, self._threads, *buffers, *self._arguments, int(1e9 * limit))


def mailbox_bytes(bytes: int, ranks: int) -> int:
    """Size of a rank's mailbox for pieces of so many bytes."""
    return 2 * ranks * _LINE * ceil_div(bytes, _UNIT)
