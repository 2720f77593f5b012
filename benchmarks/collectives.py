"""Averages over ranks as cases: the transport's own all_reduce, and the averages of `comm` against it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.truth import truth_of
from onebit.benchmarks.yardsticks import packed
from onebit.comm import CompressedAllreduce
from onebit.comm.auto import Mode
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


def _half_inputs(setting: Setting) -> Exchange:
    given = setting.normal().bfloat16()
    return Exchange(setting, given, given.clone())


def _inputs_of(mode: Mode, two_levels: bool = False) -> Callable[[Setting], Exchange]:
    def inputs(setting: Setting) -> Exchange:
        state = _exchange_inputs(setting)
        state.reduce = CompressedAllreduce(
            state.tensor,
            setting.backend,
            setting.codec,
            mode=mode,
            local_group=setting.local if two_levels else None,
            bucket_mb=setting.bucket_mb,
        )
        return state

    return inputs


def _put_back(state: Exchange) -> None:
    state.tensor.copy_(state.given)


def _all_reduce_run(state: Exchange) -> None:
    """One all_reduce of the whole tensor, by torch.distributed itself wherever it carries the group."""
    if state.setting.backend.name in ("gloo", "nccl"):
        torch.distributed.all_reduce(state.tensor)
    else:
        state.setting.backend.all_reduce(state.tensor).wait()


def _all_reduce_check(state: Exchange) -> Callable[[], int]:
    """Sums, to within one rounding of the dtype for each rank."""

    def wrong() -> int:
        exact, size = _inputs(state), state.setting.backend.size
        slack = size * torch.finfo(state.tensor.dtype).eps * exact.abs().sum(0)
        return _far(state, exact.sum(0), slack) + _differing(state)

    return wrong


def _plain_check(state: Exchange) -> Callable[[], int]:
    """Means of sums in float32, rounded once to the dtype."""

    def wrong() -> int:
        exact, size = _inputs(state), state.setting.backend.size
        slack = size * torch.finfo(torch.float32).eps * exact.abs().mean(0)
        slack += torch.finfo(state.tensor.dtype).eps * exact.mean(0).abs()
        return _far(state, exact.mean(0), slack) + _differing(state)

    return wrong


def _inputs(state: Exchange) -> Tensor:
    """(ranks, numel) float64: what every rank brought."""
    return torch.stack([given.to(state.tensor.dtype).double() for given in state.setting.normals()])


def _far(state: Exchange, exact: Tensor, slack: Tensor) -> int:
    return int((~((state.tensor.cpu().double() - exact).abs() <= slack)).sum())


def _run(state: Exchange) -> None:
    assert state.reduce is not None
    state.reduce(state.tensor)


def _stages(state: Exchange) -> dict[str, float]:
    assert state.reduce is not None
    return dict(state.reduce.stats.seconds)


def _compressed_check(state: Exchange) -> Callable[[], int]:
    assert state.reduce is not None
    state.reduce.residual.reset()

    def wrong() -> int:
        setting = state.setting
        if setting.backend.size == 1:  # nothing is sent, so nothing is compressed
            return int((state.tensor != state.given).sum())
        inputs = [given.float().numpy() for given in setting.normals()]
        return truth_of(setting.codec, setting.numel).wrong_average(inputs, state.tensor) + _differing(state)

    return wrong


def _two_level_check(state: Exchange) -> Callable[[], int]:
    """As the average over nodes of what a node's ranks, added in order in float32, have on average."""
    assert state.reduce is not None
    state.reduce.residual.reset()

    def wrong() -> int:
        setting = state.setting
        drawn, inputs = setting.normals(), []
        for first in range(0, setting.backend.size, setting.local):
            mean, *others = (given.float() for given in drawn[first : first + setting.local])
            for other in others:
                mean += other
            inputs.append((mean / setting.local).numpy())
        return truth_of(setting.codec, setting.numel).wrong_average(inputs, state.tensor) + _differing(state)

    return wrong


def _differing(state: Exchange) -> int:
    """All elements, if this rank's outcome has other bytes than rank 0's; the ranks must agree bit for bit."""
    digest = zlib.crc32(state.tensor.view(torch.uint8).cpu().numpy().data)
    digests = gather_numbers(state.setting.backend, [float(digest)])
    return 0 if digests[0] == digests[state.setting.backend.rank] else state.setting.numel


def _tensor_bytes(setting: Setting) -> float:
    return float(setting.numel * setting.dtype.itemsize)


def _share(setting: Setting) -> float:
    """2(n - 1)/n, which is what a bandwidth-optimal algorithm sends of what it averages."""
    return 2 * (setting.backend.size - 1) / setting.backend.size


def _compressed_wire(setting: Setting) -> float:
    return _share(setting) * packed(setting)


def two_level_wire(setting: Setting) -> float:
    """What a rank sends between nodes: what a flat average over nodes sends of its slice."""
    nodes = setting.backend.size // setting.local
    return 2 * (nodes - 1) / nodes * packed(setting) / setting.local


COLLECTIVES: tuple[Case[Exchange], ...] = (
    Case(
        name="all_reduce",
        summary="the transport's own all_reduce of one tensor",
        family="collectives",
        role="plain",
        capturable=True,
        moved=_tensor_bytes,
        wire=lambda setting: _share(setting) * _tensor_bytes(setting),
        inputs=_exchange_inputs,
        refresh=_put_back,
        run=_all_reduce_run,
        check=_all_reduce_check,
    ),
    Case(
        name="all_reduce-bf16",
        summary="the same of as many bfloat16 numbers, counted as the bytes of the tensor",
        family="collectives",
        role="bf16",
        capturable=True,
        moved=_tensor_bytes,
        wire=lambda setting: _share(setting) * 2 * setting.numel,
        inputs=_half_inputs,
        refresh=_put_back,
        run=_all_reduce_run,
        check=_all_reduce_check,
    ),
    Case(
        name="compressed",
        summary="CompressedAllreduce of the same tensor",
        family="collectives",
        role="one level",
        against=("plain", "bf16"),
        capturable=True,
        moved=_tensor_bytes,
        wire=_compressed_wire,
        inputs=_inputs_of("compressed"),
        refresh=_put_back,
        run=_run,
        stages=_stages,
        check=_compressed_check,
    ),
    Case(
        name="two-level",
        summary="the same on two levels, nodes of --local ranks and between them; its wire bytes are those between",
        family="collectives",
        against=("one level", "plain"),
        nodes=True,
        capturable=True,
        moved=_tensor_bytes,
        wire=two_level_wire,
        inputs=_inputs_of("compressed", two_levels=True),
        refresh=_put_back,
        run=_run,
        stages=_stages,
        check=_two_level_check,
    ),
)


def beside(kind: str, name: str, *against: str) -> Case[Any]:
    """One of `COLLECTIVES` in the family of a kind of others, on CUDA devices; measured against these roles, too."""
    (case,) = [case for case in COLLECTIVES if case.name == name]
    return replace(case, name=f"{kind}-{name}", family=f"{kind}s", devices=("cuda",), against=(*case.against, *against))


def _auto_check(state: Exchange) -> Callable[[], int]:
    """As the mode that all buckets have; where they differ, whether ranks do."""
    assert state.reduce is not None
    if "plain" not in state.reduce.modes:
        return _compressed_check(state)
    return _plain_check(state) if set(state.reduce.modes) == {"plain"} else lambda: _differing(state)


def _mode(mode: Mode, check: Callable[[Exchange], Callable[[], int]], **options: Any) -> Case[Exchange]:
    return Case(
        name=f"mode-{mode}",
        summary=f'CompressedAllreduce(mode="{mode}") of the same tensor',
        family="modes",
        capturable=True,
        moved=_tensor_bytes,
        inputs=_inputs_of(mode),
        refresh=_put_back,
        run=_run,
        stages=_stages,
        check=check,
        **options,
    )


MODES: tuple[Case[Exchange], ...] = (
    _mode("plain", _plain_check, role="mode plain", wire=lambda setting: _share(setting) * 4 * setting.numel),
    _mode("compressed", _compressed_check, role="mode compressed", wire=_compressed_wire),
    _mode("auto", _auto_check, against=("mode plain", "mode compressed")),
)
