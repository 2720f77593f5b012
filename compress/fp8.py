"""`Fp8Codec`: eight bits of floating point per number, one scale per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onebit.compress.quantized import QuantizedCodec
from onebit.compress.quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class Fp8Codec(QuantizedCodec):
    """Encodes c = x + residual as e4m3 numbers q with one scale s = max|c| / 448 per block; it says q·s.

    Elements are off by at most a sixteenth of themselves, down to s·2⁻⁶, and below that by at most s·2⁻¹⁰: small
    elements of a block keep more of themselves than with `Int8Codec`, large ones less. Ties go to even.

    A block with a c that is not finite, or so large that what it decodes to might not be (`Quantizer.bound`), sends the
    scale NaN, decodes to NaN and leaves its residual as it was. A block of
    magnitudes below 2⁻¹⁰⁰ alone says 0. Arithmetic is fp32. The format: Micikevicius et al. 2022 (arXiv 2209.05433),
    e4m3 without infinities; block-wise scales: Dettmers et al. 2021 (arXiv 2110.02861).

    Attributes:
        block_size: consecutive elements of one tensor that share a scale, a multiple of 32.
        error_feedback: averages keep what was not said, 4 bytes per element on the worker's side and 4 / ranks on the
            server's, and add it to what they encode next.
        kernels: name of the implementation to use; None: the fastest for the device of the tensors.

    Raises:
        InputError: an attribute has a value other than these.
    """

    bits: ClassVar[int] = 8

    @property
    def quantizer(self) -> Quantizer:
        """What kernels are told."""
        return Quantizer(format="fp8")
