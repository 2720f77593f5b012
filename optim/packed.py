"""The averaged momentum of one group as the payloads that it came in: signs and scales, from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce, Part
from onebit.comm.slices import Slices


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

    @property
    def parts(self) -> list[Part]:
        """Those of the average, as if it had come just now."""
        return [replace(p, gathered=kept) for p, kept in zip(self._reduce.parts, self._payloads, strict=True)]

    def write(self, rows: Sequence[Tensor]) -> None:
        """Decode it to tensors like those of the average, row-major, fp32."""
        for part in self.parts:
            part.decode(self._reduce.codec.unchecked(part.gathered.device), rows)

    def slices(self, dealt: Slices) -> list[Tensor]:
        """This rank's slices of it, new 1-D fp32 tensors; `dealt` are slices of the tensors of the average."""
        device = self._payloads[0].device if self._payloads else torch.device("cpu")
        return dealt.decode(self._reduce.codec.unchecked(device), self.parts)
