"""What the quantizing codecs share: their options, checked, and what kernels are told of them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from onebit.compress.codec import Codec
from onebit.compress.errors import InputError
from onebit.compress.kernels import quantized_kernels_for
from onebit.compress.operators import BoundOperators
from onebit.compress.quantizer import Format, Quantizer

LARGEST_ROTATED = 4096  # elements of a block that is transformed as a whole


@dataclass(frozen=True, kw_only=True)
class QuantizedCodec(Codec):
    """Rounds the elements of a block to numbers of few bits, relative to the largest of the block."""

    block_size: int = 1024
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if self.block_size is None:
            raise InputError(
                f"{type(self).__name__}: block_size must be a positive multiple of 32, got None; one scale for a whole "
                "tensor would round most of it to 0, give SignCodec for that"
            )
        super().__post_init__()
        if not isinstance(self.error_feedback, bool):
            raise InputError(f"{type(self).__name__}: error_feedback must be a bool, got {self.error_feedback!r}")

    @property
    @abstractmethod
    def quantizer(self) -> Quantizer:
        """What kernels are told."""

    def kernels_on(self, device: torch.device | str) -> str:
        """Return the name of the implementation that runs for tensors on `device`."""
        return quantized_kernels_for(torch.device(device), self.kernels).name

    def unchecked(self, device: torch.device) -> BoundOperators[Quantizer]:
        """Return the operators without checks, for who makes the same call again and again."""
        return BoundOperators(quantized_kernels_for(device, self.kernels), self.quantizer)


@dataclass(frozen=True, kw_only=True)
class IntegerCodec(QuantizedCodec):
    """Rounds to integers, to the nearest or at random, blocks as they are or transformed."""

    format: ClassVar[Format]

    rounding: Literal["nearest", "stochastic"] = "nearest"
    rotate: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        who = type(self).__name__
        if self.rounding not in ("nearest", "stochastic"):
            raise InputError(f"{who}: rounding must be 'nearest' or 'stochastic', got {self.rounding!r}")
        if not isinstance(self.rotate, bool):
            raise InputError(f"{who}: rotate must be a bool, got {self.rotate!r}")
        if self.rotate and (self.block_size > LARGEST_ROTATED or self.block_size & (self.block_size - 1)):
            raise InputError(
                f"{who}: with rotate=True block_size must be a power of two from 32 to {LARGEST_ROTATED}, got "
                f"{self.block_size}"
            )
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:
            raise InputError(f"{who}: seed must be an int of 32 bits that is not negative, got {self.seed!r}")

    @property
    def unbiased(self) -> bool:
        """Whether elements are rounded at random, so that errors have no direction."""
        return self.rounding == "stochastic"

    @property
    def quantizer(self) -> Quantizer:
        """What kernels are told."""
        stochastic = self.rounding == "stochastic"
        return Quantizer(format=self.format, stochastic=stochastic, rotate=self.rotate, seed=self.seed)
