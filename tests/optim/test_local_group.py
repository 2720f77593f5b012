"""Optimizers on two levels: ranks stay equal, steps are those of nodes, and runs resume and overlap bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, MismatchError, run_threads
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, normal

STEPS = 6
SHAPES = ((40, 50), (7,), (1500,))
MAKERS: dict[str, Callable[..., Any]] = {
    "OnebitAdam": lambda params, **options: OnebitAdam(params, lr=1e-2, freeze_step=2, **options),
    "OnebitLamb": lambda params, **options: OnebitLamb(params, lr=1e-2, freeze_step=2, **options),
    "ZeroOneAdam": lambda params, **options: ZeroOneAdam(params, lr=1e-2, var_freeze_step=2, **options),
}


def start() -> list[Tensor]:
    return [
        torch.nn.Parameter(normal(77, i, numel=2000)[: torch.Size(s).numel()].view(s)) for i, s in enumerate(SHAPES)
    ]


def gradients(rank: int, step: int) -> list[Tensor]:
    return [normal(rank, step, i, numel=2000)[: torch.Size(s).numel()].view(s).clone() for i, s in enumerate(SHAPES)]


def step_by(optimizer: Any, params: list[Tensor], given: list[Tensor]) -> None:
    """A step on these gradients, which a backward pass brings."""
    optimizer.zero_grad()
    sum((p * g).sum() for p, g in zip(params, given, strict=True)).backward()
    optimizer.step()


def train(backend: Backend, name: str, resumed: bool = False, nodes: bool = False, **options: Any) -> list[bytes]:
    """Parameters after some steps; `nodes`: a rank stands for a node of two and steps on their mean."""
    params = start()
    optimizer = MAKERS[name](params, backend=backend, bucket_mb=0.004, **options)
    for step in range(STEPS):
        if resumed and step == STEPS // 2 + 1:
            state, params = copy.deepcopy(optimizer.state_dict()), [torch.nn.Parameter(p.detach()) for p in params]
            optimizer = MAKERS[name](params, backend=backend, bucket_mb=0.004, **options)
            optimizer.load_state_dict(state)
        if nodes:
            pairs = zip(gradients(2 * backend.rank, step), gradients(2 * backend.rank + 1, step), strict=True)
            step_by(optimizer, params, [(a + b) / 2 for a, b in pairs])
        else:
            step_by(optimizer, params, gradients(backend.rank, step))
    assert optimizer.skipped_steps == 0
    if "local_group" in options:
        nodes = options["local_group"] < backend.size
        assert optimizer.kernels == ("cpu" if nodes else "torch")
        assert (optimizer.stats.local_bytes > 0) == nodes
        shared = "shared memory" if backend.in_processes else backend.name
        assert optimizer.local_transport == (shared if nodes else None)
    return bits(params)


@pytest.mark.parametrize("name", MAKERS)
def test_ranks_stay_equal_and_step_as_nodes_would(name: str) -> None:
    first, *others = run_threads(4, lambda backend: train(backend, name, local_group=2))
    assert all(other == first for other in others)
    flat = run_threads(2, lambda backend: train(backend, name, nodes=True))[0]
    for got, expected in zip(first, flat, strict=True):
        # Means over four and over two are rounded otherwise in warm-up, and nothing here is near a change of sign.
        values = [torch.frombuffer(bytearray(content), dtype=torch.float32) for content in (got, expected)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_resumed_and_overlapped_runs_are_the_same_bit_for_bit(name: str) -> None:
    straight = run_threads(4, lambda backend: train(backend, name, local_group=2))
    assert run_threads(4, lambda backend: train(backend, name, resumed=True, local_group=2)) == straight
    assert run_threads(4, lambda backend: train(backend, name, overlap=True, local_group=2)) == straight


def train_all(backend: Backend) -> list[list[bytes]]:
    return [train(backend, name, overlap=overlap, local_group=2) for name in MAKERS for overlap in (False, True)]


def test_processes_which_share_memory_make_the_steps_of_threads_bit_for_bit() -> None:
    assert run_ranks("gloo", 4, train_all) == run_threads(4, train_all)


@pytest.mark.parametrize("overlap", [False, True])
def test_one_node_is_exact(overlap: bool) -> None:
    first, *others = run_threads(3, lambda b: train(b, "OnebitAdam", overlap=overlap, local_group=3))
    assert others == [first] * 2


def test_a_step_with_a_number_that_is_not_finite_is_skipped_on_all_ranks_and_leaves_no_trace() -> None:
    def skip(backend: Backend, bad_step: int | None) -> list[bytes]:
        params = start()
        optimizer = OnebitAdam(params, lr=1e-2, freeze_step=1, backend=backend, local_group=2)
        for step in range(3):
            step_by(optimizer, params, gradients(backend.rank, step))
            if step == bad_step:
                before = bits(params)
                bad = gradients(backend.rank, 9)
                bad[0][3, 4] = torch.nan if backend.rank == 3 else 0.0
                step_by(optimizer, params, bad)
                assert bits(params) == before
                assert optimizer.skipped_steps == 1
        return bits(params)

    for with_bad, without in zip(run_threads(4, skip, 1), run_threads(4, skip, None), strict=True):
        for got, expected in zip(with_bad, without, strict=True):
            values = [torch.frombuffer(bytearray(content), dtype=torch.float32) for content in (got, expected)]
            torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)  # error feedback is put back to within rounding


def test_ranks_that_disagree_are_told() -> None:
    def disagree(backend: Backend) -> None:
        params = start()
        optimizer = OnebitAdam(params, backend=backend, freeze_step=1, local_group=2 if backend.rank else None)
        with pytest.raises(MismatchError, match="do not agree on local_group: rank 0: None; ranks 1, 2, 3: 2"):
            step_by(optimizer, params, gradients(backend.rank, 0))

    run_threads(4, disagree)
