"""clip_grad_norm_: one factor for all ranks, torch's own on one rank, a mean gradient that is no longer than asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, InputError, run_threads
from onebit.optim import OnebitAdam, clip_grad_norm_
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits
from tests.optim.samples import contents, gradients, mean_of, parameters, patchy, step

NORMS = [1.0, 2.0, 3.5, math.inf]


def given(rank: int, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters with one rank's gradients, of which some are missing."""
    params = parameters(dtype=dtype)
    for p, g in zip(params, patchy(params, rank, 1), strict=True):
        p.grad = g
    return params


def clipped(params: Sequence[Tensor]) -> list[Any]:
    """The gradients that there are, bit by bit."""
    return [bits(p.grad) for p in params if p.grad is not None]


def norm_of(params: Sequence[Tensor], p: float) -> float:
    flat = np.concatenate([q.grad.double().numpy().reshape(-1) for q in params if q.grad is not None])
    return float(np.linalg.norm(flat, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [0.1, 1e9, 0.0])
@pytest.mark.parametrize("norm_type", NORMS)
def test_on_one_rank_it_is_torchs(norm_type: float, max_norm: float, dtype: torch.dtype) -> None:
    ours, theirs = ([p for p in given(0, dtype) if p.numel()] for _ in range(2))  # torch has no maximum of nothing
    total = clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert bits(total) == bits(expected)
    assert clipped(ours) == clipped(theirs)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_total_is_the_power_mean_of_the_ranks_norms_and_all_are_scaled_by_one_factor(
    world_size: int, norm_type: float
) -> None:
    norms = np.array([norm_of(given(rank), norm_type) for rank in range(world_size)])
    expected = norms.max() if norm_type == math.inf else (norms**norm_type).mean() ** (1 / norm_type)

    def clip(backend: Backend) -> tuple[list[bytes], float]:
        params, before = given(backend.rank), given(backend.rank)
        total = clip_grad_norm_(params, 0.5, norm_type, backend=backend)
        # A norm in fp32 is a sum of some 300 products; the mean is in fp64 and rounded once.
        assert float(total) == pytest.approx(expected, rel=1e-6)
        for p, old in zip(params, before, strict=True):
            assert (p.grad is None) == (old.grad is None)
            if p.grad is not None and old.grad is not None:
                assert bits(p.grad) == bits(old.grad * (0.5 / (total + 1e-6)))
        return bits(total), float(total)

    assert len({repr(seen) for seen in run_threads(world_size, clip)}) == 1


@pytest.mark.parametrize("norm_type", NORMS)
def test_the_mean_of_clipped_gradients_is_no_longer_than_asked(norm_type: float) -> None:
    def clip(backend: Backend) -> list[Tensor | None]:
        params = parameters()
        for p, g in zip(params, gradients(params, backend.rank, 3), strict=True):
            p.grad = (
                g * (10.0 ** (2 * backend.rank)) if g is not None else None
            )  # one rank's gradient dwarfs the others'
        clip_grad_norm_(params, 1.0, norm_type, backend=backend)
        return [p.grad for p in params]

    mean = parameters()
    for p, g in zip(mean, mean_of(run_threads(3, clip)), strict=True):
        p.grad = g
    assert 0.1 < norm_of(mean, norm_type) <= 1.0 + 1e-5


def test_it_takes_an_optimizer_with_its_backend_or_a_parameter_and_costs_one_collective() -> None:
    def clip(backend: Backend) -> list[list[bytes]]:
        params = given(backend.rank)
        optimizer = OnebitAdam([{"params": params[:3]}, {"params": params[3:]}], freeze_step=2, backend=backend)
        backend.traffic.reset()
        first = clip_grad_norm_(optimizer, 0.3)
        assert backend.traffic.collectives == 1
        assert backend.traffic.wire_bytes == 8
        again = given(backend.rank)
        assert bits(clip_grad_norm_(again, 0.3, backend=backend)) == bits(first)
        assert bits([p.grad for p in again if p.grad is not None]) == bits(
            [p.grad for p in params if p.grad is not None]
        )
        assert bits(clip_grad_norm_(again[3], 0.3)) == bits(clip_grad_norm_([again[3]], 0.3, backend=backend))
        return [bits(first)]

    run_threads(2, clip)


def test_a_rank_without_gradients_takes_part_with_nothing() -> None:
    def clip(backend: Backend) -> float:
        params = [Parameter(torch.zeros(4))]
        if backend.rank == 0:
            params[0].grad = torch.full((4,), 2.0)
        total = clip_grad_norm_(params, 1.0, backend=backend)
        assert clip_grad_norm_([], 1.0, backend=backend) == 0
        return float(total)

    assert run_threads(2, clip) == [pytest.approx(4 / math.sqrt(2))] * 2
    assert float(clip_grad_norm_([Parameter(torch.zeros(2))], 1.0)) == 0


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients_count_with_the_sum_of_what_stands_in_one_place(coalesced: bool) -> None:
    places, numbers = torch.tensor([[1, 1, 3]]), torch.tensor([[3.0], [1.0], [3.0]])
    sparse = torch.sparse_coo_tensor(places, numbers, (5, 1), check_invariants=True)
    p, q = Parameter(torch.zeros(5, 1)), Parameter(torch.zeros(1))
    p.grad = sparse.coalesce() if coalesced else sparse
    q.grad = torch.zeros(1)
    assert float(clip_grad_norm_([p, q], 1.0)) == 5.0  # 4 and 3
    torch.testing.assert_close(p.grad.to_dense()[:, 0], torch.tensor([0, 0.8, 0, 0.6, 0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_number_that_is_not_finite_is_an_error_on_every_rank_if_asked_and_else_the_step_is_skipped_by_all(
    bad: float, norm_type: float
) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=2, backend=backend)
        for number in range(5):
            for p, g in zip(params, gradients(params, backend.rank, number), strict=True):
                p.grad = g
            if backend.rank == 1:
                assert params[0].grad is not None
                params[0].grad.view(-1)[3] = bad
            held = clipped(params)
            with pytest.raises(InputError, match=f"rank {backend.rank}: clip_grad_norm_: .*over 3 ranks is (nan|inf)"):
                clip_grad_norm_(optimizer, 1.0, norm_type, error_if_nonfinite=True)
            assert clipped(params) == held
            total = clip_grad_norm_(optimizer, 1.0, norm_type)
            assert not bool(torch.isfinite(total))
            before = contents(optimizer)
            optimizer.step()
            assert contents(optimizer) == before
            step(optimizer, gradients(params, backend.rank, number))
        assert optimizer.skipped_steps == 5

    run_threads(3, train)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_type": 0}, "norm_type must be more than 0, got 0"),
        ({"norm_type": math.nan}, "norm_type must be more than 0"),
        ({"max_norm": -1.0}, "max_norm must be at least 0, got -1.0"),
        ({"max_norm": math.nan}, "max_norm must be at least 0, got nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        clip_grad_norm_(given(0), **{"max_norm": 1.0, **options})


def over_gloo(backend: Backend) -> tuple[float, list[Any]]:
    params = given(backend.rank)
    optimizer = OnebitAdam(params, freeze_step=2, backend=backend)
    total = clip_grad_norm_(optimizer, 0.5)
    return float(total), clipped(params)


def test_a_number_in_a_string_is_taken_as_torch_takes_it() -> None:
    of_string, of_number = given(0), given(0)
    clip_grad_norm_(of_string, "0.5")  # type: ignore[arg-type]
    clip_grad_norm_(of_number, 0.5)
    assert clipped(of_string) == clipped(of_number)


@pytest.mark.slow
def test_processes_over_gloo_agree_as_threads_do() -> None:
    assert run_ranks("gloo", 2, over_gloo) == run_threads(2, over_gloo)
