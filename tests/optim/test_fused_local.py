"""ZeroOneAdam with the fused kernel of local steps goes the way it goes without; the CPU runs the kernel's source."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from onebit.comm import Backend, run_threads
from onebit.optim import ZeroOneAdam
from onebit.optim.fused_local import FusedLocal
from onebit.optim.gpu.local import LocalStep
from tests.comm.samples import arrays
from tests.optim.samples import contents, parameters, step, through_a_file
from tests.optim.test_zero_one_adam import KINDS, SOON, mixed, mostly, spoiled
from tests.optim.warps_on_cpu import COMPILER, kernels_on_cpu

__all__ = ["kernels_on_cpu"]

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no g++"), pytest.mark.usefixtures("kernels_on_cpu")]

BAD = (15, 17, 19, 20)  # local steps: the first and the last of an interval, and two that follow each other


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[LocalStep]]:
    """Call it, and local steps are fused from then on; what it returns lists those made."""

    def turn_on() -> list[LocalStep]:
        made: list[LocalStep] = []
        original, one_at_a_time = LocalStep.make, threading.Lock()

        def make(self: LocalStep) -> None:
            with one_at_a_time:  # the lanes of a warp are the process's own
                original(self)
            made.append(self)

        monkeypatch.setattr(LocalStep, "make", make)
        monkeypatch.setattr(FusedLocal, "can", staticmethod(lambda params, states, group, codec: bool(params)))
        return made

    return turn_on


def run(
    backend: Backend,
    start: Callable[[], list[Parameter]],
    options: dict[str, Any],
    bad: bool = False,
    resume: int | None = None,
) -> tuple[list[Any], list[Any], int]:
    """Contents and parameters after every step, and how many were left out; resume: from a file before this step."""
    params = start()
    optimizer = ZeroOneAdam(params, backend=backend, **options)
    seen, values = [], []
    for number in range(len(KINDS)):
        if number == resume:
            state = through_a_file(optimizer.state_dict())
            params = [Parameter(p.detach().clone()) for p in params]
            optimizer = ZeroOneAdam(params, backend=backend, **options)
            optimizer.load_state_dict(state)
        made = spoiled(params, backend.rank, number, math.inf, BAD) if bad else mostly(params, backend.rank, number)
        step(optimizer, made)
        seen.append(contents(optimizer))
        values.append(arrays(params))
    return seen, values, optimizer.left_out_steps


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "with bad steps"])
@pytest.mark.parametrize(("start", "masters"), [(parameters, False), (mixed, False), (mixed, True)])
def test_fused_local_steps_go_where_separate_operations_go(
    start: Callable[[], list[Parameter]], masters: bool, bad: bool, fused: Callable[[], list[LocalStep]]
) -> None:
    options = {**SOON, "master_weights": masters}
    expected = run_threads(2, run, start, options, bad)
    made = fused()
    seen = run_threads(2, run, start, options, bad)
    assert len(made) == 2 * KINDS.count("local")
    for (_, mine, left_out), (_, theirs, also) in zip(seen, expected, strict=True):
        assert left_out == also
        for number, (xs, ys) in enumerate(zip(mine, theirs, strict=True)):
            for p, x, y in zip(start(), xs, ys, strict=True):
                # A few roundings in fp32 a step; they may decide how a parameter is rounded to 16 bits.
                unit = 0.0 if p.dtype == torch.float32 else torch.finfo(p.dtype).eps
                assert np.all(np.abs(x - y) <= 2e-6 + unit * np.abs(y)), f"step {number + 1}"
    for number, kind in enumerate(KINDS):
        assert (seen[0][0][number] == seen[1][0][number]) == (kind != "local"), f"step {number + 1}"


def test_a_run_with_fused_local_steps_resumes_bit_for_bit_in_the_middle_of_an_interval(
    fused: Callable[[], list[LocalStep]],
) -> None:
    fused()
    expected = [seen for seen, _, _ in run_threads(2, run, parameters, SOON)]
    for start in (15, 16, 18):
        assert [seen for seen, _, _ in run_threads(2, run, parameters, SOON, False, start)] == expected


class Counting(TorchDispatchMode):
    """Counts torch's operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("several", [False, True], ids=["one count", "two counts"])
def test_the_operations_of_a_local_step_do_not_grow_with_the_number_of_tensors(
    several: bool, fused: Callable[[], list[LocalStep]]
) -> None:
    def operations(backend: Backend, n: int) -> int:
        params = [Parameter(torch.ones(3)) for _ in range(n)]
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        for number, kind in enumerate(KINDS):
            for i, p in enumerate(params):
                p.grad = None if several and number == 0 and i == 1 else torch.full((3,), 1.0 + i + number)
            mode = Counting()
            with mode:
                optimizer.step()
            if kind == "local" and KINDS[number - 1] == "local":
                return mode.count
        raise AssertionError("no local step followed another")

    fused()
    (few, _), (many, _) = run_threads(2, operations, 3), run_threads(2, operations, 30)
    assert few == many
