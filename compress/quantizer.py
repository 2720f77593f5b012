"""`Quantizer`: how the elements of a block become small numbers, as every implementation is told it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["int8", "int4", "fp8"]

_BITS: dict[Format, int] = {"int8": 8, "int4": 4, "fp8": 8}
_LARGEST: dict[Format, float] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """What an element of a block is rounded to, and how.

    Attributes:
        format: integers of 8 or 4 bits, or e4m3 floating point of 8.
        stochastic: up or down at random, so that the expected value is the element; else to the nearest.
        rotate: the block is transformed before, and back after.
        seed: of what is drawn at random, 32 bits.
    """

    format: Format
    stochastic: bool = False
    rotate: bool = False
    seed: int = 0

    @property
    def bits(self) -> int:
        """Of a code."""
        return _BITS[self.format]

    @property
    def largest(self) -> float:
        """What the largest magnitude of a block becomes."""
        return _LARGEST[self.format]

    @property
    def bound(self) -> float:
        """A block with a magnitude of this or more counts as not finite, for what it decodes to might not be.

        A transform of up to 4096 elements may have a sum of 4096 times the largest.
        """
        return 2.0**115 if self.rotate else 2.0**127
