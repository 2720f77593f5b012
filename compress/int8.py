"""`Int8Codec`: eight bits per number, one scale per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onebit.compress.quantized import IntegerCodec
from onebit.compress.quantizer import Format


@dataclass(frozen=True, kw_only=True)
class Int8Codec(IntegerCodec):
    """Encodes c = x + residual as integers q of [-127, 127] with one scale s = max|c| / 127 per block; it says q·s.

    To the nearest, no element is off by more than s / 2, and the wire takes a quarter of fp32's bytes. Without error
    feedback it needs no memory and no state, at about the precision of bfloat16 for the large elements of a block.

    A block with a c that is not finite, or so large that what it decodes to might not be (`Quantizer.bound`), sends the
    scale NaN, decodes to NaN and leaves its residual as it was. A block of
    magnitudes below 2⁻¹⁰⁰ alone says 0. All arithmetic is fp32. Block-wise scales: Dettmers et al. 2021
    (arXiv 2110.02861); stochastic rounding of what is averaged: Alistarh et al. 2017 (QSGD, arXiv 1610.02132); rotation
    before it: Suresh et al. 2017 (arXiv 1611.00429), here without their random signs.

    Attributes:
        block_size: consecutive elements of one tensor that share a scale, a multiple of 32; with `rotate` a power of
            two up to 4096.
        error_feedback: averages keep what was not said, 4 bytes per element on the worker's side and 4 / ranks on the
            server's, and add it to what they encode next.
        rounding: ``"nearest"``, ties to even; or ``"stochastic"``: up with the probability of what is above the integer
            below, so that errors have no direction. What decides is drawn from the bits of the block and `seed`: the
            same input gives the same bytes, on every device.
        rotate: blocks go through a Walsh-Hadamard transform before, and back after, which spreads an outlier over its
            block, so that it does not spoil the scale of the others.
        seed: of the stochastic rounding, 32 bits; another gives other draws.
        kernels: name of the implementation to use; None: the fastest for the device of the tensors.

    Raises:
        InputError: an attribute has a value other than these.
    """

    bits: ClassVar[int] = 8
    format: ClassVar[Format] = "int8"
