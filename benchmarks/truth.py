"""Counts what is wrong in what a codec gives for one tensor, by the oracle of that codec."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebit.benchmarks import quantized_oracle
from onebit.benchmarks.oracle import ROUNDING, Floats, Payload, spans, wrong_average, wrong_encoding
from onebit.compress import Codec, SignCodec, num_threads
from onebit.compress.layout import Layout
from onebit.compress.quantized import QuantizedCodec


class Truth(ABC):
    """What must come out of one codec for one tensor; residuals are None where none is kept."""

    @abstractmethod
    def wrong_encoding(self, sums: Tensor, residual: Tensor | None, payload: Tensor) -> int:
        """Wrong elements of an encoding of `sums`, (numel,) float32, exactly what was to be encoded.

        residual: (numel,), after the encoding. payload: (bytes,), what was written.
        """

    @abstractmethod
    def wrong_reduction(self, payloads: Tensor, before: Tensor | None, after: Tensor | None, payload: Tensor) -> int:
        """Wrong elements of `payload`, the mean of `payloads`, (n, bytes); `before`, `after`: residuals, (numel,)."""

    @abstractmethod
    def decoded(self, payload: Tensor) -> Iterator[tuple[slice, NDArray[np.floating]]]:
        """What a payload decodes to, slice by slice."""

    @abstractmethod
    def wrong_average(self, inputs: Sequence[Floats], outcome: Tensor) -> int:
        """Wrong elements of the average of `inputs`, one (numel,) a rank, from residuals of zero."""


@dataclass(frozen=True)
class SignTruth(Truth):
    """Signs are exact but where the sum is 0 to within rounding; scales are right to within rounding."""

    numel: int
    block: int

    def wrong_encoding(self, sums: Tensor, residual: Tensor | None, payload: Tensor) -> int:
        """As of `Truth`."""
        assert residual is not None
        exact, after, target = sums.cpu().numpy(), residual.cpu().numpy(), self._apart(payload)
        return sum(
            wrong_encoding(exact[span].astype(np.float64), np.zeros(span.stop - span.start), target, after[span], span)
            for span in spans(len(exact), self.block)
        )

    def wrong_reduction(self, payloads: Tensor, before: Tensor | None, after: Tensor | None, payload: Tensor) -> int:
        """As of `Truth`."""
        assert before is not None
        assert after is not None
        old, new = before.cpu().numpy(), after.cpu().numpy()
        sources, target = [self._apart(source) for source in payloads], self._apart(payload)
        count = 0
        for span in spans(self.numel, self.block):
            values = [source.values(span) for source in sources]
            exact = sum(values, np.zeros(1)) / len(values) + old[span]
            slack = ROUNDING * (sum(map(np.abs, values), np.zeros(1)) / len(values) + np.abs(old[span]))
            count += wrong_encoding(exact, slack, target, new[span], span)
        return count

    def decoded(self, payload: Tensor) -> Iterator[tuple[slice, NDArray[np.floating]]]:
        """As of `Truth`."""
        source = self._apart(payload)
        return ((span, source.values(span)) for span in spans(self.numel, self.block))

    def wrong_average(self, inputs: Sequence[Floats], outcome: Tensor) -> int:
        """As of `Truth`."""
        rounding = ROUNDING if outcome.dtype == torch.float32 else torch.finfo(outcome.dtype).eps
        got = outcome.float().cpu().numpy()

        def wrong(span: slice) -> int:
            return wrong_average([values[span] for values in inputs], got[span], self.block, rounding)

        return _sum_over(spans(self.numel, self.block), wrong)

    def _apart(self, payload: Tensor) -> Payload:
        return Payload(payload.cpu().numpy().reshape(-1), self.numel, self.block)


@dataclass(frozen=True)
class QuantizedTruth(Truth):
    """Every bit is exact."""

    layout: Layout
    spec: quantized_oracle.Spec

    def wrong_encoding(self, sums: Tensor, residual: Tensor | None, payload: Tensor) -> int:
        """As of `Truth`."""
        exact, (codes, scales) = sums.cpu().numpy(), self._apart(payload.view(1, -1))
        kept = None if residual is None else residual.cpu().numpy()
        return sum(
            self._wrong(exact[span], codes[0], scales[0], None if kept is None else kept[span], span)
            for span in self._spans()
        )

    def wrong_reduction(self, payloads: Tensor, before: Tensor | None, after: Tensor | None, payload: Tensor) -> int:
        """As of `Truth`."""
        (sources, shares), (codes, scales) = self._apart(payloads), self._apart(payload.view(1, -1))
        old = None if before is None else before.cpu().numpy()
        new = None if after is None else after.cpu().numpy()
        count = 0
        for span in self._spans():
            blocks = self._blocks(span)
            mean = quantized_oracle.mean(sources[:, blocks], shares[:, blocks], self.spec).reshape(-1)
            exact = mean[: span.stop - span.start] + (0 if old is None else old[span])
            count += self._wrong(exact, codes[0], scales[0], None if new is None else new[span], span)
        return count

    def decoded(self, payload: Tensor) -> Iterator[tuple[slice, NDArray[np.floating]]]:
        """As of `Truth`."""
        codes, scales = self._apart(payload.view(1, -1))
        for span in self._spans():
            blocks = self._blocks(span)
            said = quantized_oracle.decode(codes[0, blocks], scales[0, blocks], self.spec)
            yield span, said.reshape(-1)[: span.stop - span.start]

    def wrong_average(self, inputs: Sequence[Floats], outcome: Tensor) -> int:
        """As of `Truth`."""
        got = outcome.cpu()

        def wrong(span: slice) -> int:
            said = [self._encoded(values[span]) for values in inputs]
            codes, scales = np.stack([s.codes for s in said]), np.stack([s.scales for s in said])
            mean = quantized_oracle.mean(codes, scales, self.spec).reshape(-1)[: span.stop - span.start]
            whole = self._encoded(mean)
            expected = quantized_oracle.decode(whole.codes, whole.scales, self.spec).reshape(-1)
            rounded = torch.from_numpy(expected[: span.stop - span.start]).to(got.dtype)
            return int((rounded != got[span]).sum())

        return _sum_over(self._spans(), wrong)

    def _wrong(
        self, exact: Floats, codes: NDArray[np.uint8], scales: Floats, residual: Floats | None, span: slice
    ) -> int:
        blocks, expected = self._blocks(span), self._encoded(exact)
        values = [quantized_oracle.values(c, self.spec) for c in (expected.codes, codes[blocks])]
        wrong = (values[0] != values[1]) | (expected.scales != scales[blocks])[:, None]
        flat = wrong.reshape(-1)[: len(exact)]
        if residual is not None:
            flat |= expected.residual.reshape(-1)[: len(exact)] != residual
        return int(np.count_nonzero(flat))

    def _encoded(self, sums: Floats) -> quantized_oracle.Encoded:
        size = self.spec.block_size
        blocks = np.pad(sums, (0, -len(sums) % size)).reshape(-1, size)
        real = (np.arange(blocks.size) < len(sums)).reshape(blocks.shape)
        return quantized_oracle.encode(blocks, None, real, real, self.spec)

    def _apart(self, rows: Tensor) -> tuple[NDArray[np.uint8], Floats]:
        return quantized_oracle.taken_apart(rows.cpu().numpy(), self.layout, self.spec)

    def _spans(self) -> Iterator[slice]:
        return spans(self.layout.numel, self.spec.block_size)

    def _blocks(self, span: slice) -> slice:
        return slice(span.start // self.spec.block_size, -(-span.stop // self.spec.block_size))


def _sum_over(slices: Iterator[slice], wrong: Callable[[slice], int]) -> int:
    """Of all slices, in threads, for NumPy lets others run while it computes."""
    with ThreadPoolExecutor(num_threads()) as pool:
        return sum(pool.map(wrong, slices))


def truth_of(codec: Codec, numel: int) -> Truth:
    """What must come out of `codec` for a tensor of `numel` elements.

    Raises:
        TypeError: there is no oracle of such a codec.
    """
    if isinstance(codec, SignCodec):
        return SignTruth(numel, codec.block_size or numel)
    if isinstance(codec, QuantizedCodec):
        how = codec.quantizer
        spec = quantized_oracle.Spec(how.format, codec.block_size, how.stochastic, how.rotate, how.seed)
        return QuantizedTruth(codec.plan([numel])[0], spec)
    raise TypeError(
        f"the driver has no oracle of {type(codec).__name__}; there are ones of the codecs of onebit.compress"
    )
