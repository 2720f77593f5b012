"""The codec's three kernels as cases: encode, reduce_encode and decode of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.oracle import ROUNDING, Payload, spans, wrong_encoding
from onebit.benchmarks.yardsticks import count_wrong, encoded, packed
from onebit.compress.layout import Layout


@dataclass
class Coding:
    """Inputs and outputs of one kernel.

    x: (numel,), what is encoded or the output of decode. residual: (numel,) float32. payloads: (n, bytes) uint8,
    what reduce_encode averages. payload: (bytes,) uint8, written by encode and reduce_encode, read by decode. layout:
    planned once, as it has tables on the device, which cannot be made while a graph is captured.
    """

    setting: Setting
    x: Tensor
    residual: Tensor
    payloads: Tensor
    payload: Tensor
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        (self.layout,) = self.setting.codec.plan([self.setting.numel])

    def taken_apart(self, payload: Tensor) -> Payload:
        """`payload` as the oracle reads it."""
        numel = self.setting.numel
        return Payload(payload.cpu().numpy().reshape(-1), numel, self.setting.codec.block_size or numel)


def _absent(setting: Setting, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=setting.device)


def _encode_inputs(setting: Setting) -> Coding:
    residual = torch.zeros(setting.numel, device=setting.device)
    x = setting.normal()
    payload = setting.codec.encode(x, residual)
    return Coding(setting, x, residual, _absent(setting, torch.uint8), payload)


def _encode_run(state: Coding) -> None:
    state.setting.codec.encode(state.x, state.residual, layout=state.layout, out=state.payload)


def _encode_check(state: Coding) -> Callable[[], int]:
    sums = state.x.float() + state.residual
    return lambda: count_wrong(sums, state.residual, state.taken_apart(state.payload))


def _reduce_inputs(setting: Setting) -> Coding:
    payloads = torch.stack([setting.codec.encode(setting.normal(rank)) for rank in range(setting.payloads)])
    residual = torch.zeros(setting.numel, device=setting.device)
    return Coding(setting, _absent(setting, setting.dtype), residual, payloads, torch.zeros_like(payloads[0]))


def _reduce_run(state: Coding) -> None:
    state.setting.codec.reduce_encode(state.payloads, state.residual, layout=state.layout, out=state.payload)


def _reduce_check(state: Coding) -> Callable[[], int]:
    before = state.residual.clone().cpu().numpy()
    sources = [state.taken_apart(payload) for payload in state.payloads]

    def wrong() -> int:
        after = state.residual.cpu().numpy()
        target = state.taken_apart(state.payload)
        count = 0
        for span in spans(target.numel, target.block):
            values = [source.values(span) for source in sources]
            exact = sum(values, np.zeros(1)) / len(values) + before[span]
            slack = ROUNDING * (sum(map(np.abs, values), np.zeros(1)) / len(values) + np.abs(before[span]))
            count += wrong_encoding(exact, slack, target, after[span], span)
        return count

    return wrong


def _decode_inputs(setting: Setting) -> Coding:
    payload = setting.codec.encode(setting.normal())
    x = torch.zeros(setting.numel, dtype=setting.dtype, device=setting.device)
    return Coding(setting, x, _absent(setting, torch.float32), _absent(setting, torch.uint8), payload)


def _decode_run(state: Coding) -> None:
    state.setting.codec.decode(state.payload, state.x, layout=state.layout)


def _decode_check(state: Coding) -> Callable[[], int]:
    state.x.zero_()
    source = state.taken_apart(state.payload)

    def wrong() -> int:
        count, decoded = 0, state.x.cpu()
        for span in spans(source.numel, source.block):
            expected = torch.from_numpy(source.values(span)).to(decoded.dtype)
            count += int((expected != decoded[span]).sum())
        return count

    return wrong


def _reduce_encoded(setting: Setting) -> float:
    """Read n payloads and the residual, write the residual and one payload."""
    return 8.0 * setting.numel + (setting.payloads + 1) * packed(setting)


def _decoded(setting: Setting) -> float:
    """Read a payload, write the tensor."""
    return setting.numel * setting.dtype.itemsize + packed(setting)


KERNELS: tuple[Case[Coding], ...] = (
    Case(
        name="encode",
        summary="SignCodec.encode of a tensor and its residual",
        family="kernels",
        against=("copy", "chain"),
        capturable=True,
        moved=encoded,
        inputs=_encode_inputs,
        run=_encode_run,
        check=_encode_check,
    ),
    Case(
        name="reduce_encode",
        summary="SignCodec.reduce_encode of --payloads payloads",
        family="kernels",
        against=("copy",),
        capturable=True,
        moved=_reduce_encoded,
        inputs=_reduce_inputs,
        run=_reduce_run,
        check=_reduce_check,
    ),
    Case(
        name="decode",
        summary="SignCodec.decode into a tensor that exists",
        family="kernels",
        against=("copy",),
        capturable=True,
        moved=_decoded,
        inputs=_decode_inputs,
        run=_decode_run,
        check=_decode_check,
    ),
)
