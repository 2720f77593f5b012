"""`Int4Codec`: four bits per number, one scale per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onebit.compress.quantized import IntegerCodec
from onebit.compress.quantizer import Format


@dataclass(frozen=True, kw_only=True)
class Int4Codec(IntegerCodec):
    """Encodes c = x + residual as integers q of [-7, 7] with one scale s = max|c| / 7 per block; it says q·s.

    An eighth of fp32's bytes. Seven steps are few for a block of a thousand elements: keep error feedback, or take
    smaller blocks, stochastic rounding and rotation. All else is as of `Int8Codec`: what is not finite, the sources,
    and the attributes.

    Attributes:
        block_size, error_feedback, rounding, rotate, seed, kernels: as of `Int8Codec`.

    Raises:
        InputError: an attribute has another value than it may have.
    """

    bits: ClassVar[int] = 4
    format: ClassVar[Format] = "int4"
