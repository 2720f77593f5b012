"""The averaged momentum of one group as the payloads that it came in: signs and scales, from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce


class PackedMomentum:
    """A copy of what the last step of a compressed average has brought.

    Args:
        reduce: the average of the momenta; its masks must stay those of its last step while this is in use.

    Attributes:
        filled: there is a momentum here; else it is where it was before the first average.
    """

    def __init__(self, reduce: CompressedAllreduce) -> None:
        self._reduce = reduce
        self._payloads = [torch.zeros_like(part.gathered) for part in reduce.parts]
        self.filled = False

    def keep(self) -> None:
        """Copy what has come."""
        for payload, part in zip(self._payloads, self._reduce.parts, strict=True):
            payload.copy_(part.gathered)
        self.filled = True

    def write(self, rows: Sequence[Tensor]) -> None:
        """Decode it to tensors like those of the average, row-major, fp32."""
        for payload, part in zip(self._payloads, self._reduce.parts, strict=True):
            replace(part, gathered=payload).decode(self._reduce.codec.unchecked(payload.device), rows)
