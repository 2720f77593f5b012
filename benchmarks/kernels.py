"""The codec's three kernels as cases: encode, reduce_encode and decode of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.truth import Truth, truth_of
from onebit.benchmarks.yardsticks import encoded, kept, packed
from onebit.compress.layout import Layout


@dataclass
class Coding:
    """Inputs and outputs of one kernel.

    x: (numel,), what is encoded or the output of decode. residual: (numel,) float32; None where no errors
    are kept. payloads: (n, bytes) uint8, what reduce_encode averages. payload: (bytes,) uint8, written by encode and
    reduce_encode, read by decode. layout: planned once, as it has tables on the device, which cannot be made while a
    graph is captured.
    """

    setting: Setting
    x: Tensor
    residual: Tensor | None
    payloads: Tensor
    payload: Tensor
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        (self.layout,) = self.setting.codec.plan([self.setting.numel])

    @property
    def truth(self) -> Truth:
        """What must come out."""
        return truth_of(self.setting.codec, self.setting.numel)


def _absent(setting: Setting, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=setting.device)


def _residual(setting: Setting) -> Tensor | None:
    return torch.zeros(setting.numel, device=setting.device) if setting.codec.error_feedback else None


def _encode_inputs(setting: Setting) -> Coding:
    residual = _residual(setting)
    x = setting.normal()
    payload = setting.codec.encode(x, residual)
    return Coding(setting, x, residual, _absent(setting, torch.uint8), payload)


def _encode_run(state: Coding) -> None:
    state.setting.codec.encode(state.x, state.residual, layout=state.layout, out=state.payload)


def _encode_check(state: Coding) -> Callable[[], int]:
    x = state.x.float()
    sums = x if state.residual is None else x + state.residual
    return lambda: state.truth.wrong_encoding(sums, state.residual, state.payload)


def _reduce_inputs(setting: Setting) -> Coding:
    payloads = torch.stack([setting.codec.encode(setting.normal(rank)) for rank in range(setting.payloads)])
    residual = _residual(setting)
    return Coding(setting, _absent(setting, setting.dtype), residual, payloads, torch.zeros_like(payloads[0]))


def _reduce_run(state: Coding) -> None:
    state.setting.codec.reduce_encode(state.payloads, state.residual, layout=state.layout, out=state.payload)


def _reduce_check(state: Coding) -> Callable[[], int]:
    before = None if state.residual is None else state.residual.clone()
    return lambda: state.truth.wrong_reduction(state.payloads, before, state.residual, state.payload)


def _decode_inputs(setting: Setting) -> Coding:
    payload = setting.codec.encode(setting.normal())
    x = torch.zeros(setting.numel, dtype=setting.dtype, device=setting.device)
    return Coding(setting, x, None, _absent(setting, torch.uint8), payload)


def _decode_run(state: Coding) -> None:
    state.setting.codec.decode(state.payload, state.x, layout=state.layout)


def _decode_check(state: Coding) -> Callable[[], int]:
    state.x.zero_()

    def wrong() -> int:
        count, decoded = 0, state.x.cpu()
        for span, values in state.truth.decoded(state.payload):
            expected = torch.from_numpy(values).to(decoded.dtype)
            count += int((expected != decoded[span]).sum())
        return count

    return wrong


def _reduce_encoded(setting: Setting) -> float:
    """Read n payloads and the residual, write the residual, where errors are kept, and one payload."""
    return float(kept(setting)) * setting.numel + (setting.payloads + 1) * packed(setting)


def _decoded(setting: Setting) -> float:
    """Read a payload, write the tensor."""
    return setting.numel * setting.dtype.itemsize + packed(setting)


KERNELS: tuple[Case[Coding], ...] = (
    Case(
        name="encode",
        summary="the codec's encode of a tensor and its residual",
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
        summary="the codec's reduce_encode of --payloads payloads",
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
        summary="the codec's decode into a tensor that exists",
        family="kernels",
        against=("copy",),
        capturable=True,
        moved=_decoded,
        inputs=_decode_inputs,
        run=_decode_run,
        check=_decode_check,
    ),
)
