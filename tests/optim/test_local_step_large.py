"""Large local steps on the CPU, which threads share and write past the cache, change what small ones would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from onebit.compress import SignCodec, set_num_threads
from onebit.compress.cpu.operators import STREAM_BYTES
from onebit.optim.cpu.local import LocalStep

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARTS = 16


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    yield
    set_num_threads(None)


def operands(dtype: torch.dtype) -> list[Tensor]:
    """One tensor for each role, of a size that is no multiple of anything."""
    torch.manual_seed(3)
    numel = STREAM_BYTES // dtype.itemsize + 1055
    grad, param, *others = (torch.randn(numel) for _ in range(5))
    return [grad.to(dtype), param.to(dtype), *others, torch.rand(numel)]


def make(lists: Sequence[Sequence[Tensor]], begins: bool) -> bool:
    """Make a step of these grads, params, momenta, means, starts and variances; returns whether it was taken."""
    grads, params, momenta, means, starts, variances = lists
    finite = torch.zeros((), dtype=torch.bool)
    LocalStep(
        layout=SignCodec().plan(grads)[0],
        grads=grads,
        params=params,
        momenta=momenta,
        means=means,
        starts=starts,
        variances=variances,
        rows=torch.tensor([[1.0 if begins else 0.25, 1e-2, 0.999, 1.25]] * len(grads)),
        finite=finite,
        beta1=0.9,
        alpha=0.1,
        eps=1e-8,
        begins=[True] * len(grads) if begins else None,
    ).make()
    return bool(finite)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_step_is_that_of_its_parts(dtype: torch.dtype, begins: bool) -> None:
    whole, expected = operands(dtype), operands(dtype)
    set_num_threads(1)
    for part in zip(*(t.tensor_split(PARTS) for t in expected), strict=True):
        assert make([[t] for t in part], begins)
    set_num_threads(3)
    assert make([[t] for t in whole], begins)
    for mine, theirs in zip(whole, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("begins", [False, True])
def test_what_one_thread_finds_makes_all_leave_the_step_out(begins: bool) -> None:
    seen = []
    for threads in (1, 3):
        lists = operands(torch.float32)
        lists[0][7] = torch.inf
        set_num_threads(threads)
        assert not make([[t] for t in lists], begins)
        seen.append(lists)
    before = operands(torch.float32)
    for mine, theirs in zip(*seen, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(seen[0][2], before[2])
    assert torch.equal(seen[0][3], torch.zeros_like(before[3]) if begins else before[3] * 0.75)


def test_tensors_without_elements_are_passed_over() -> None:
    for sizes in ([0], [0, 5, 0]):
        lists = [[torch.ones(n) for n in sizes] for _ in range(6)]
        assert make(lists, begins=True)
        assert all(torch.equal(y, torch.ones(n)) for y, n in zip(lists[4], sizes, strict=True))
