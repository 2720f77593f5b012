"""The five stages of a compressed average as cases of their own, each on what a rank has of one bucket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.kernels import KERNELS
from onebit.benchmarks.yardsticks import packed

PATTERN = 251  # a prime, so that pieces of equal size do not look alike


@dataclass
class Transfer:
    """sent, received: uint8; `expected` is what `received` must hold afterwards."""

    setting: Setting
    sent: Tensor
    received: Tensor
    expected: Tensor


def _chunk(setting: Setting) -> Setting:
    """What one rank serves: as many payloads as ranks, each of a part of the elements."""
    ranks = setting.backend.size
    return replace(setting, numel=-(-setting.numel // ranks), payloads=ranks)


def _payload_bytes(setting: Setting) -> int:
    return setting.codec.plan([setting.numel], setting.backend.size)[0].payload_bytes


def _bytes(setting: Setting, rank: int, count: int) -> Tensor:
    """`count` bytes that differ from rank to rank and from place to place."""
    numbers = torch.arange(count, dtype=torch.int64) * (rank + 2) + 31 * rank
    return (numbers % PATTERN).to(torch.uint8).to(setting.device)


def _exchange_inputs(setting: Setting) -> Transfer:
    rank, ranks, size = setting.backend.rank, setting.backend.size, _payload_bytes(setting)
    sent = [_bytes(setting, source, ranks * size) for source in range(ranks)]
    expected = torch.cat([whole.view(ranks, size)[rank] for whole in sent])
    return Transfer(setting, sent[rank], torch.zeros_like(expected), expected)


def _gather_inputs(setting: Setting) -> Transfer:
    sent = [_bytes(setting, source, _payload_bytes(setting)) for source in range(setting.backend.size)]
    expected = torch.cat(sent)
    return Transfer(setting, sent[setting.backend.rank], torch.zeros_like(expected), expected)


def _exchange(state: Transfer) -> None:
    state.setting.backend.all_to_all(state.received, state.sent).wait()


def _gather(state: Transfer) -> None:
    state.setting.backend.all_gather(state.received, state.sent).wait()


def _check(state: Transfer) -> Callable[[], int]:
    state.received.zero_()
    return lambda: int((state.received != state.expected).sum())


def _wire(setting: Setting) -> float:
    """(n - 1)/n of the payload: each phase sends half of it."""
    return (setting.backend.size - 1) / setting.backend.size * packed(setting)


def _transfer(name: str, inputs: Callable[[Setting], Transfer], run: Callable[[Transfer], None]) -> Case[Transfer]:
    return Case(
        name=f"stage-{name}",
        summary=f"{name} of the payloads of one bucket",
        family="stages",
        capturable=True,
        moved=packed,
        wire=_wire,
        inputs=inputs,
        run=run,
        check=_check,
    )


def _kernel(name: str, of: Callable[[Setting], Setting]) -> Case[Any]:
    """A kernel on the part of the tensor that a rank has of it in this stage."""
    (case,) = [case for case in KERNELS if case.name == name]
    return replace(
        case,
        name=f"stage-{name}",
        summary=f"{name} as a rank of an average runs it",
        family="stages",
        against=(),
        moved=lambda setting: case.moved(of(setting)),
        inputs=lambda setting: case.inputs(of(setting)),
    )


STAGES: tuple[Case[Any], ...] = (
    _kernel("encode", lambda setting: setting),
    _transfer("all_to_all", _exchange_inputs, _exchange),
    _kernel("reduce_encode", _chunk),
    _transfer("all_gather", _gather_inputs, _gather),
    _kernel("decode", lambda setting: setting),
)
