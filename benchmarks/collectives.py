"""Averages over ranks as cases: the transport's own all_reduce, and the compressed average against it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.oracle import ROUNDING, spans, wrong_average
from onebit.benchmarks.yardsticks import packed
from onebit.comm import CompressedAllreduce
from onebit.comm.numbers import gather_numbers


@dataclass
class Exchange:
    """given: (numel,), this rank's input, kept. tensor: (numel,), averaged in place."""

    setting: Setting
    given: Tensor
    tensor: Tensor
    reduce: CompressedAllreduce | None = None


def _exchange_inputs(setting: Setting) -> Exchange:
    given = setting.normal()
    return Exchange(setting, given, given.clone())


def _compressed_inputs(setting: Setting) -> Exchange:
    state = _exchange_inputs(setting)
    state.reduce = CompressedAllreduce(
        state.tensor, backend=setting.backend, codec=setting.codec, bucket_mb=setting.bucket_mb
    )
    return state


def _put_back(state: Exchange) -> None:
    state.tensor.copy_(state.given)


def _plain_run(state: Exchange) -> None:
    """One all_reduce of the whole tensor, by torch.distributed itself wherever it carries the group."""
    if state.setting.backend.name in ("gloo", "nccl"):
        torch.distributed.all_reduce(state.tensor)
    else:
        state.setting.backend.all_reduce(state.tensor).wait()


def _plain_check(state: Exchange) -> Callable[[], int]:
    def wrong() -> int:
        size = state.setting.backend.size
        inputs = [state.setting.normal(rank).double() for rank in range(size)]
        expected = torch.stack(inputs).sum(0)
        slack = size * torch.finfo(state.tensor.dtype).eps * torch.stack(inputs).abs().sum(0)
        return int((~((state.tensor.double() - expected).abs() <= slack)).sum()) + _differing(state)

    return wrong


def _compressed_run(state: Exchange) -> None:
    assert state.reduce is not None
    state.reduce(state.tensor)


def _compressed_stages(state: Exchange) -> dict[str, float]:
    assert state.reduce is not None
    return dict(state.reduce.stats.seconds)


def _compressed_check(state: Exchange) -> Callable[[], int]:
    assert state.reduce is not None
    state.reduce.residual.reset()

    def wrong() -> int:
        setting = state.setting
        if setting.backend.size == 1:  # nothing is sent, so nothing is compressed
            return int((state.tensor != state.given).sum())
        inputs = [setting.normal(rank).float().numpy() for rank in range(setting.backend.size)]
        outcome = state.tensor.float().numpy()
        block = setting.codec.block_size or setting.numel
        rounding = ROUNDING if setting.dtype == torch.float32 else torch.finfo(setting.dtype).eps
        count = sum(
            wrong_average([values[span] for values in inputs], outcome[span], block, rounding)
            for span in spans(setting.numel, block)
        )
        return count + _differing(state)

    return wrong


def _differing(state: Exchange) -> int:
    """All elements, if this rank's outcome has other bytes than rank 0's; the ranks must agree bit for bit."""
    digest = zlib.crc32(state.tensor.view(torch.uint8).numpy().data)
    digests = gather_numbers(state.setting.backend, [float(digest)])
    return 0 if digests[0] == digests[state.setting.backend.rank] else state.setting.numel


def _tensor_bytes(setting: Setting) -> float:
    return float(setting.numel * setting.dtype.itemsize)


def _plain_wire(setting: Setting) -> float:
    """2(n - 1)/n of the tensor, which is what a bandwidth-optimal algorithm sends."""
    return 2 * (setting.backend.size - 1) / setting.backend.size * _tensor_bytes(setting)


def _compressed_wire(setting: Setting) -> float:
    """2(n - 1)/n of the payload: n - 1 chunks in each of the two phases."""
    return 2 * (setting.backend.size - 1) / setting.backend.size * packed(setting)


COLLECTIVES: tuple[Case[Exchange], ...] = (
    Case(
        name="all_reduce",
        summary="the transport's own all_reduce of one tensor",
        family="collectives",
        role="plain",
        moved=_tensor_bytes,
        wire=_plain_wire,
        inputs=_exchange_inputs,
        refresh=_put_back,
        run=_plain_run,
        check=_plain_check,
    ),
    Case(
        name="compressed",
        summary="CompressedAllreduce of the same tensor",
        family="collectives",
        against=("plain",),
        moved=_tensor_bytes,
        wire=_compressed_wire,
        inputs=_compressed_inputs,
        refresh=_put_back,
        run=_compressed_run,
        stages=_compressed_stages,
        check=_compressed_check,
    ),
)
