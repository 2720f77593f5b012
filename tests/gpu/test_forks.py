"""Optimizers that were dropped harm no process that is forked afterwards, and hold nothing of the device's.

CUDA works in no forked process: what one frees there of the device's would end it, as it ends a DataLoader's workers.
"""

from __future__ import annotations

import gc
import os
import weakref
from typing import Any

import pytest
import torch
import torch._dynamo  # as in tests/optim/test_freed.py
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from onebit.comm import Backend, run_threads
from onebit.optim import FusedAdam, OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.optim.samples import step, values

CASES: list[tuple[type[Any], dict[str, Any]]] = [
    (OnebitAdam, {"freeze_step": 3}),
    (OnebitLamb, {"freeze_step": 3}),
    (ZeroOneAdam, {"var_freeze_step": 3, "local_step_scaler": 2}),
]


def trained(kind: type[Any], options: dict[str, Any]) -> Any:
    params = [Parameter(values(i, shape=(3000 + i,)).cuda()) for i in range(3)]
    optimizer = kind(params, lr=1e-3, **options)
    for number in range(9):
        step(optimizer, [values(i, number, shape=tuple(p.shape)).cuda() for i, p in enumerate(params)])
    return optimizer


def of_threads(kind: type[Any], options: dict[str, Any]) -> list[Any]:
    def train(backend: Backend) -> Any:
        return trained(kind, {**options, "backend": backend})

    return run_threads(2, train)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_the_device_holds_nothing_of_an_optimizer_that_was_dropped(kind: type[Any], options: dict[str, Any]) -> None:
    """Not even where the host has not heard of its last steps."""
    of_threads(kind, options)  # what is made once stays
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        optimizers = of_threads(kind, options)
        dropped = [weakref.ref(optimizer) for optimizer in optimizers]
        del optimizers
        assert [optimizer() for optimizer in dropped] == [None, None]
        assert torch.cuda.memory_allocated() <= before  # less where something older went
    finally:
        gc.enable()


@pytest.mark.parametrize(("kind", "options"), [*CASES, (FusedAdam, {})], ids=str)
def test_a_forked_process_does_not_free_what_its_parent_dropped(kind: type[Any], options: dict[str, Any]) -> None:
    gc.collect()
    gc.disable()
    try:
        for optimizer in [trained(kind, options)] if kind is FusedAdam else of_threads(kind, options):
            LambdaLR(optimizer, lambda number: 1.0)  # each holds the other
        del optimizer
        torch.cuda.synchronize()
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        gc.enable()
