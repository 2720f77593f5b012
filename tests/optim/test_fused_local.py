"""ZeroOneAdam with a fused kernel of local steps, the CPU's or the GPU's source, goes the way it goes without."""

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
from onebit.compress import Int8Codec, SignCodec
from onebit.optim import ZeroOneAdam, zero_one_adam
from onebit.optim.cpu import local as cpu
from onebit.optim.gpu import local as gpu
from onebit.optim.local_kernels import LocalStep
from tests.comm.samples import arrays
from tests.optim.samples import contents, mixed, parameters, step, through_a_file
from tests.optim.warps_on_cpu import COMPILER, kernels_on_cpu
from tests.optim.zero_one_runs import KINDS, SOON, mostly, spoiled

__all__ = ["kernels_on_cpu"]

BAD = (15, 17, 19, 20)  # local steps: the first and the last of an interval, and two that follow each other


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local steps are made by torch's operations, until `fused` is called."""
    monkeypatch.setattr(zero_one_adam, "local_kernel", lambda device, group, codec: None)


@pytest.fixture(params=["cpu", "gpu"])
def fused(
    request: pytest.FixtureRequest, unfused: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[LocalStep]]:
    """Call it, and local steps are fused from then on; what it returns lists those made."""
    if request.param == "cpu":
        kernel: type[LocalStep] = cpu.LocalStep
    elif COMPILER is None:
        pytest.skip("no g++")
    else:
        request.getfixturevalue("kernels_on_cpu")
        kernel = gpu.LocalStep
    made: list[LocalStep] = []
    original, one_at_a_time = kernel.make, threading.Lock()

    def make(self: LocalStep) -> None:
        with one_at_a_time:  # the lanes of a warp are the process's own
            original(self)
        made.append(self)

    def turn_on() -> list[LocalStep]:
        monkeypatch.setattr(kernel, "make", make)
        monkeypatch.setattr(zero_one_adam, "local_kernel", lambda device, group, codec: kernel)
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


def test_an_optimizer_tells_what_makes_its_local_steps() -> None:
    def told(backend: Backend, **options: Any) -> str:
        return ZeroOneAdam(parameters(), backend=backend, **{**SOON, **options}).local_kernels

    reference = SignCodec(kernels="reference")
    coupled = {"adamw_mode": False, "weight_decay": 0.1}
    assert run_threads(1, told) == ["torch"]
    assert run_threads(2, told) == ["cpu"] * 2
    for options, expected in (({"codec": Int8Codec()}, "cpu"), ({"codec": reference}, "torch"), (coupled, "torch")):
        assert run_threads(2, lambda backend, options=options: told(backend, **options)) == [expected] * 2
