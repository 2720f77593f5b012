"""What must come out, computed with NumPy in float64 and independently of the library, in slices that bound memory.

Signs must be equal, except where the exact sum lies within rounding of zero. Scales may differ from the float64 mean by
the rounding of a float32 sum: 1024 terms added in 32 lanes meet 37 roundings, and `ROUNDING` allows 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]

ROUNDING = 64 * 2.0**-24
SLICE_BLOCKS = 4096


@dataclass(frozen=True)
class Payload:
    """A payload taken apart: `[bits | float32 scales]`, blocks of `block` elements, `numel` of them real."""

    data: NDArray[np.uint8]
    numel: int
    block: int

    def signs(self, span: slice) -> Bools:
        """The sign bits of elements `span`, which starts on a block boundary; True is +."""
        packed = self.data[span.start // 8 : -(-span.stop // 8)]
        return np.unpackbits(packed, bitorder="little")[: span.stop - span.start].astype(bool)

    def scales(self, span: slice) -> Floats:
        """The scale of every element of `span`."""
        blocks = -(-self.numel // self.block)
        start = -(-blocks * self.block // 128) * 16
        scales = self.data[start : start + 4 * blocks].view(np.float32)
        return per_element(scales[span.start // self.block : -(-span.stop // self.block)], span, self.block)

    def values(self, span: slice) -> Doubles:
        """What elements `span` decode to."""
        scales = self.scales(span).astype(np.float64)
        return np.where(self.signs(span), scales, -scales)


def per_element(scales: NDArray[np.floating], span: slice, block: int) -> NDArray[np.floating]:
    """Repeat one scale per block of `span` for each of its elements."""
    return np.repeat(scales, block)[: span.stop - span.start]


def spans(numel: int, block: int) -> Iterator[slice]:
    """Slices of whole blocks that together are `numel` elements."""
    step = SLICE_BLOCKS * block
    for start in range(0, numel, step):
        yield slice(start, min(start + step, numel))


def block_means(values: Doubles, block: int) -> Doubles:
    """Mean of |values| over each block, the last one over its real elements only."""
    starts = np.arange(0, len(values), block)
    counts = np.diff(np.append(starts, len(values)))
    means: Doubles = np.add.reduceat(np.abs(values), starts) / counts
    return means


def wrong_encoding(exact: Doubles, slack: Doubles, payload: Payload, residual: Floats, span: slice) -> int:
    """Elements of `span` whose sign, scale or new residual is not that of `exact`, known to within `slack`.

    exact, slack: (k,) float64, the sums to encode. residual: (k,) float32, after the encoding.
    """
    signs, scales = payload.signs(span), payload.scales(span)
    means = per_element(block_means(exact, payload.block), span, payload.block)
    scale_slack = per_element(block_means(slack, payload.block), span, payload.block) + ROUNDING * means
    allowed = slack + scale_slack + ROUNDING * (np.abs(exact) + means)
    wrong = (signs != (exact >= 0)) & (np.abs(exact) > slack)
    wrong |= ~(np.abs(scales - means) <= scale_slack)
    wrong |= ~(np.abs(residual - (exact - np.where(signs, scales, -scales))) <= allowed)
    return int(np.count_nonzero(wrong))


def wrong_average(inputs: list[Floats], outcome: Floats, block: int, rounding: float = 0.0) -> int:
    """Elements of `outcome` that are not the compressed average of `inputs` from residuals of zero, over one span.

    inputs: one (k,) float32 a rank, starting on a block boundary. outcome: (k,). rounding: of a narrower output dtype.
    """
    span = slice(0, len(outcome))
    exact = np.zeros(len(outcome))
    for values in inputs:
        doubles = values.astype(np.float64)
        scales = per_element(block_means(doubles, block), span, block)
        exact += np.where(values >= 0, scales, -scales) / len(inputs)
    means = per_element(block_means(exact, block), span, block)
    slack = 2 * ROUNDING * max(float(np.abs(exact).max(initial=0.0)), float(means.max(initial=0.0)))
    wrong = ((outcome >= 0) != (exact >= 0)) & (np.abs(exact) > slack)
    wrong |= ~(np.abs(np.abs(outcome) - means) <= slack + rounding * means)
    return int(np.count_nonzero(wrong))
