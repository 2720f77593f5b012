"""What a benchmark on GPUs times as whole steps, made on CPUs: which rows there are, and that errors are counted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from onebit.benchmarks import whole_steps as module
from onebit.benchmarks.whole_steps import whole_steps
from onebit.comm import Backend
from onebit.optim import OnebitAdam
from tests.comm.launcher import run_ranks

SHAPES = [(3000,), (40, 50), (7,)]
ROUNDS = 1
ADAMW = {"AdamW", "AdamW + NCCL fp32", "AdamW + NCCL bf16"}
TWO_LEVELS = ("OnebitAdam tiny, nodes of 2", "OnebitAdam tiny, nodes of 2, sharded")


@contextmanager
def on_cpu() -> Iterator[pytest.MonkeyPatch]:
    """Nothing is asked of a GPU: steps are made and not timed, memory is nothing, and Gloo sums where NCCL averages."""

    def timed(run: Callable[[], object], rounds: int, launches: int) -> list[float]:
        for _ in range(rounds):
            run()
        return [1.0] * rounds

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, reduce: Any = dist.all_reduce) -> None:
        reduce(tensor, op=dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "timed", timed)
        patch.setattr(module, "INTERVAL", 2)
        patch.setattr(module, "COMPARED", SHAPES)
        patch.setattr(module, "STEPS", 1)
        patch.setattr(dist, "all_reduce", all_reduce)
        for name in ("memory_allocated", "max_memory_allocated", "synchronize", "reset_peak_memory_stats"):
            patch.setattr(torch.cuda, name, lambda: 0)
        yield patch


def rows(backend: Backend, per_node: int, spoiled: str = "") -> dict[str, Any]:
    """Case to wrong elements and roles; the steps of the case `spoiled` move one element of one rank, or of all."""
    made, steps = [], OnebitAdam.step

    def step(self: OnebitAdam, closure: Any = None) -> Any:
        result = steps(self, closure)
        sharded = "sharded" in spoiled and self._shard
        if sharded or ("rank 1" in spoiled and backend.rank == 1):
            with torch.no_grad():
                self.param_groups[0]["params"][0][5] += 0.25
        return result

    with on_cpu() as patch:
        if spoiled:
            patch.setattr(OnebitAdam, "step", step)
        made, figures = whole_steps(" tiny", SHAPES, torch.device("cpu"), ROUNDS, per_node)
    return {
        "wrong": {row.case: row.wrong for row in made},
        "roles": {row.case: set(row.ratios) for row in made},
        "figures": figures,
    }


def right_and_spoiled(backend: Backend) -> tuple[dict[str, Any], dict[str, Any]]:
    return rows(backend, 2), rows(backend, 2, "sharded")


@functools.cache
def four_ranks() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return run_ranks("gloo", 4, right_and_spoiled)


def test_steps_on_two_levels_are_measured_beside_the_others_and_right() -> None:
    for found, _ in four_ranks():
        assert found["wrong"] == {
            "OnebitAdam tiny": 0,
            **dict.fromkeys(TWO_LEVELS, 0),
            "AdamW(fused=True) tiny": None,
            "AdamW(fused=True) + NCCL float32 tiny": None,
            "AdamW(fused=True) + NCCL bfloat16 tiny": None,
            "ZeroOneAdam tiny": 0,
            "OnebitLamb tiny": 0,
        }
        assert found["roles"]["OnebitAdam tiny"] == ADAMW
        for case in TWO_LEVELS:
            assert found["roles"][case] == {*ADAMW, "OnebitAdam"}
        assert found["roles"]["OnebitLamb tiny"] == {"OnebitAdam"}
        assert found["figures"]["kernels"] == "cpu"
        assert {"held", "temporary", "kernels"} == set(found["figures"]["nodes of 2"])
        assert set(found["figures"]["nodes of 2, sharded"]) == set(found["figures"]["nodes of 2"])


@pytest.mark.parametrize("per_node", [1, 2])
def test_a_single_node_has_no_two_levels(per_node: int) -> None:
    for found in run_ranks("gloo", 2, rows, per_node):
        assert not [case for case in found["wrong"] if "nodes" in case]
        assert found["wrong"]["OnebitAdam tiny"] == 0


def test_one_element_that_is_not_as_with_replicated_state_is_counted_on_every_rank() -> None:
    for _, found in four_ranks():
        wrong = {case: count for case, count in found["wrong"].items() if count}
        assert wrong == {TWO_LEVELS[1]: 4}  # on four ranks


def test_one_element_that_differs_between_ranks_is_counted_on_every_rank() -> None:
    for found in run_ranks("gloo", 2, rows, 1, "rank 1"):
        assert found["wrong"] == {**found["wrong"], "OnebitAdam tiny": 1, "ZeroOneAdam tiny": 0, "OnebitLamb tiny": 0}
