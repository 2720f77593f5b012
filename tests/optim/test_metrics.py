"""What a run plots: every number against what it is said to be, worked out apart from the library."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import CompressedOptimizer, OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.optim.samples import gradients, parameters, patchy, step

FREEZE = 3
OPTIMIZERS: dict[str, tuple[type[CompressedOptimizer], dict[str, Any]]] = {
    "OnebitAdam": (OnebitAdam, {"freeze_step": FREEZE}),
    "ZeroOneAdam": (ZeroOneAdam, {"var_freeze_step": FREEZE, "local_step_scaler": 2, "local_step_clipper": 2}),
    "OnebitLamb": (OnebitLamb, {"freeze_step": FREEZE}),
}


def made(name: str, backend: Backend, params: Any = None) -> CompressedOptimizer:
    kind, options = OPTIMIZERS[name]
    return kind(parameters() if params is None else params, backend=backend, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_value_is_a_number_or_a_phase_and_the_keys_are_those_that_are_documented(
    name: str, world_size: int
) -> None:
    def train(backend: Backend) -> None:
        optimizer = made(name, backend)
        for number in range(2 * FREEZE):
            found = optimizer.metrics(compression_error=True)
            seconds = {key for key in found if key.startswith("seconds/")}
            documented = {
                "step",
                "phase/0",
                "skipped_steps",
                "collectives",
                "wire_bytes",
                "dense_bytes",
                "residual_norm",
            }
            assert found.keys() - seconds - {"compression_error"} == documented
            assert all(
                type(value)
                is (
                    str
                    if key == "phase/0"
                    else float
                    if key in seconds | {"residual_norm", "compression_error"}
                    else int
                )
                for key, value in found.items()
            )
            assert (found["step"], found["phase/0"]) == (number, optimizer.phase())
            step(optimizer, gradients(optimizer.param_groups[0]["params"], backend.rank, number))
        found = optimizer.metrics(compression_error=True)
        sent = optimizer.stats
        assert (found["wire_bytes"], found["dense_bytes"]) == (sent.wire_bytes, sent.dense_bytes)
        assert (sent.wire_bytes > 0) == ("compression_error" in found) == (world_size > 1)
        assert {key.removeprefix("seconds/"): value for key, value in found.items() if key.startswith("seconds/")} == (
            sent.seconds
        )

    run_threads(world_size, train)


def test_it_costs_no_collective_and_changes_nothing() -> None:
    def train(backend: Backend, looked_at: bool) -> list[Tensor]:
        optimizer = made("OnebitAdam", backend)
        params = optimizer.param_groups[0]["params"]
        for number in range(2 * FREEZE):
            step(optimizer, gradients(params, backend.rank, number))
            before = backend.traffic.collectives
            if looked_at and backend.rank == 0:  # a collective of one rank alone would hang
                optimizer.metrics(compression_error=True)
            assert backend.traffic.collectives == before
        return [p.detach() for p in params]

    for seen, plain in zip(run_threads(2, train, True), run_threads(2, train, False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True))


@pytest.mark.parametrize("given", [gradients, patchy], ids=["all", "patchy"])
def test_the_compression_error_is_what_the_signs_of_the_last_average_left_out(given: Any) -> None:
    """Against float64: c is the local momentum plus the feedback that there was, and a block of it becomes its mean."""

    def train(backend: Backend) -> None:
        params = [Parameter(torch.zeros(7, 131)), Parameter(torch.zeros(3000))]
        optimizer = OnebitAdam(params, freeze_step=1, weight_decay=0.0, backend=backend)
        feedback = [torch.zeros_like(p, dtype=torch.float64) for p in params]
        for number in range(4):
            momenta = [s["exp_avg"].double() for s in optimizer.state_dict()["state"].values()]
            step(
                optimizer, [g.view_as(p) for g, p in zip(gradients(params, backend.rank, number), params, strict=True)]
            )
            if number == 0:
                assert "compression_error" not in optimizer.metrics(compression_error=True)
                continue
            unsaid = whole = 0.0
            for p, m, e in zip(params, momenta, feedback, strict=True):
                assert p.grad is not None
                c = 0.9 * m.view_as(p) + 0.1 * p.grad.double() + e
                blocks = [
                    block - block.abs().mean() * torch.where(block >= 0, 1.0, -1.0) for block in c.view(-1).split(1024)
                ]
                e.copy_(torch.cat(blocks).view_as(e))
                whole, unsaid = whole + float(c.square().sum()), unsaid + float(e.square().sum())
            found = optimizer.metrics(compression_error=True)["compression_error"]
            # fp32 moments, feedback and norms: a few units in the sixth place
            assert found == pytest.approx(math.sqrt(unsaid / whole), rel=1e-5)

    run_threads(2, train)


def test_the_residual_norm_is_that_of_what_would_be_saved() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = made("OnebitAdam", backend, [{"params": params[:3]}, {"params": params[3:]}])
        for number in range(2 * FREEZE):
            step(optimizer, gradients(params, backend.rank, number))
        saved = [
            part
            for state in optimizer.state_dict()["onebit"]["residuals"]
            for part in (state["worker"], state["server"])
        ]
        expected = math.sqrt(sum(float(part.double().square().sum()) for part in saved))
        assert expected > 0
        assert optimizer.metrics()["residual_norm"] == pytest.approx(expected, rel=1e-5)  # fp32 norms

    run_threads(3, train)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_is_counted_and_has_no_compression_error_until_the_next(name: str) -> None:
    def train(backend: Backend) -> None:
        optimizer = made(name, backend)
        params = optimizer.param_groups[0]["params"]
        number = 0
        while optimizer.phase() not in ("compressed", "sync") or number < FREEZE + 1:
            step(optimizer, gradients(params, backend.rank, number))
            number += 1
        bad = gradients(params, backend.rank, number)
        if backend.rank == 1:
            bad[3].view(-1)[7] = math.nan  # type: ignore[union-attr]
        step(optimizer, bad)
        found = optimizer.metrics(compression_error=True)
        assert found["skipped_steps"] == 1
        assert "compression_error" not in found
        step(optimizer, gradients(params, backend.rank, number))
        assert 0 < optimizer.metrics(compression_error=True)["compression_error"] < 1  # type: ignore[operator]

    run_threads(2, train)


def test_an_overlapped_step_tells_how_much_of_it_was_sent_during_backward() -> None:
    def train(backend: Backend) -> None:
        params = [Parameter(torch.ones(3000)) for _ in range(4)]
        optimizer = OnebitAdam(params, freeze_step=1, backend=backend, overlap=True, bucket_mb=0.01)
        for number in range(4):
            sum((p * p).sum() for p in params).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            found = optimizer.metrics()
            assert (found.get("overlapped_buckets", 0), found.get("buckets", 0)) == optimizer.overlapped
            assert ("buckets" in found) == (number > 0)  # the first step finds out in which order gradients come

    run_threads(2, train)


def test_each_group_has_its_phase_and_the_step_is_that_of_the_oldest() -> None:
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    optimizer = OnebitAdam(first.parameters(), freeze_step=1)
    for module in (first, first, second):
        if module is second:
            optimizer.add_param_group({"params": list(second.parameters()), "compress": False})
        for p in [*first.parameters(), *second.parameters()]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    found = optimizer.metrics()
    assert (found["step"], found["phase/0"], found["phase/1"]) == (3, "compressed", "dense")
