"""An optimizer given a process group uses the half of it that carries its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from onebit.comm import BackendError
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam

OPTIMIZERS: dict[str, Callable[[Any, object], Any]] = {
    "OnebitAdam": lambda params, group: OnebitAdam(params, freeze_step=1, backend=group),
    "OnebitLamb": lambda params, group: OnebitLamb(params, freeze_step=1, backend=group),
    "ZeroOneAdam": lambda params, group: ZeroOneAdam(params, var_freeze_step=1, backend=group),
}


@pytest.fixture
def both_halves(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A group of one rank that says it has Gloo and NCCL, as init_process_group() makes one where there are GPUs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cpu:gloo,cuda:nccl")
    yield dist.group.WORLD
    dist.destroy_process_group()


def parameter(device: str) -> torch.nn.Parameter:
    """One without memory, so that it may be on a GPU that is not there."""
    with FakeTensorMode():
        return torch.nn.Parameter(torch.ones(3, device=device))


@pytest.mark.parametrize(("device", "name"), [("cpu", "gloo"), ("cuda", "nccl")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_half_is_that_of_the_parameters(optimizer: str, device: str, name: str, both_halves: object) -> None:
    made = OPTIMIZERS[optimizer]([parameter(device)], both_halves)
    assert made.backend.name == name


def test_a_group_that_carries_nothing_is_refused_at_once(both_halves: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cpu:ucc")
    with pytest.raises(BackendError, match="cannot carry cpu tensors"):
        OPTIMIZERS["OnebitAdam"]([torch.nn.Parameter(torch.ones(3))], both_halves)
