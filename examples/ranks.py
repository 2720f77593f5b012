"""What ranks tell each other beside gradients: means of numbers, and whether they hold the same model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.comm.backend import Backend


def mean_over_ranks(values: list[float], backend: Backend, device: torch.device) -> list[float]:
    """The mean over ranks of each of `values`, on every rank."""
    total = torch.tensor(values, device=device)
    backend.all_reduce(total).wait()
    means: list[float] = (total / backend.size).tolist()
    return means


def checksums(parameters: Sequence[Tensor], backend: Backend) -> list[int]:
    """A CRC of every rank's parameters, in rank order, on every rank."""
    crc = 0
    for parameter in parameters:
        crc = zlib.crc32(parameter.detach().cpu().numpy().tobytes(), crc)
    mine = torch.tensor([crc], device=parameters[0].device)
    everyone = mine.new_empty(backend.size)
    backend.all_gather(everyone, mine).wait()
    numbers: list[int] = everyone.tolist()
    return numbers
