"""Tensors whose elements share memory: refused where they would be written, before anything is sent or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import (
    Backend,
    CompressedAllGather,
    CompressedAllreduce,
    CompressedReduceScatter,
    DenseAllreduce,
    InputError,
    MismatchError,
    Residual,
    compressed_all_gather,
    compressed_allreduce,
    compressed_reduce_scatter,
    run_threads,
)
from onebit.comm.tensors import shared_places
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam, clip_grad_norm_
from tests.comm.samples import bits, normal, state_bits

N = 3000

SHARED: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.ones(1).expand(N),
    "rows expanded": lambda: torch.ones(N // 10).expand(10, -1),
    "windows": lambda: torch.ones(N).as_strided((N - 1, 2), (1, 1)),
}
OWN: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.ones(20, 30).t(),
    "every other": lambda: torch.ones(2 * N)[::2],
    "channels last": lambda: torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "one element, expanded": lambda: torch.ones(1).expand(1, 1, 1),
    "no element, expanded": lambda: torch.ones(0, 1).expand(0, 5),
}
shared = pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=3))
def test_what_is_let_through_has_every_element_in_a_place_of_its_own(dims: list[tuple[int, int]]) -> None:
    """Against all addresses, counted; a tensor without such places may pass only if it is found to have them."""
    shape, strides = [size for size, _ in dims], [stride for _, stride in dims]
    tensor = torch.zeros(100).as_strided(shape, strides)
    indices = np.indices(shape).reshape(len(shape), -1) if shape else np.zeros((0, 1), dtype=int)
    addresses = (indices * np.array(strides, dtype=int).reshape(-1, 1)).sum(axis=0)
    if shared_places(tensor) is None:
        assert len(np.unique(addresses)) == tensor.numel()


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_other_strides_are_taken(make: Callable[[], Tensor]) -> None:
    def average(backend: Backend) -> None:
        tensor = make()
        CompressedAllreduce(tensor, backend)(tensor.mul_(backend.rank))
        assert torch.equal(tensor, torch.full_like(tensor, 0.5))
        tensor.fill_(backend.rank)
        DenseAllreduce(tensor, backend)(tensor)
        assert torch.equal(tensor, torch.full_like(tensor, 0.5))

    run_threads(2, average)


@shared
def test_an_average_refuses_them_with_nothing_sent_and_its_feedback_as_it_was(make: Callable[[], Tensor]) -> None:
    def check(backend: Backend) -> None:
        odd = make()
        like = torch.zeros(odd.shape)
        # Made for the odd one, as what tells shapes may share memory: it is not written.
        reduce, dense, gather = (
            CompressedAllreduce(odd, backend),
            DenseAllreduce(odd, backend),
            CompressedAllGather(odd, backend),
        )
        reduce(normal(backend.rank, numel=odd.numel()).view(odd.shape))
        shard = normal(backend.rank, numel=gather.shard_numel)
        gather(shard, torch.empty_like(like))
        feedback = state_bits([reduce.state_dict(), gather.residual.state_dict()])
        sent = backend.traffic.collectives
        calls: list[Callable[[], object]] = [
            lambda: reduce(odd),
            lambda: reduce.start(odd),
            lambda: dense(odd),
            lambda: dense(like, out=odd),
            lambda: gather(shard, odd),
        ]
        for call in calls:
            with pytest.raises(InputError, match=rf"rank {backend.rank}: tensor 0 must have its elements in places"):
                call()
        assert backend.traffic.collectives == sent
        assert state_bits([reduce.state_dict(), gather.residual.state_dict()]) == feedback
        assert bool((odd == 1).all())
        for call in (lambda: reduce(like), lambda: dense(like), lambda: gather(shard, like)):
            call()  # nor is a refused call in the way of the next

    run_threads(2, check)


@shared
def test_work_that_is_under_way_waits_for_another_out(make: Callable[[], Tensor]) -> None:
    def check(backend: Backend) -> None:
        odd = make()
        given = normal(backend.rank, numel=odd.numel()).view(odd.shape)
        shard_of = CompressedAllGather(given, backend)
        shard = normal(backend.rank, numel=shard_of.shard_numel)
        reduce = CompressedAllreduce(given, backend)
        flights: list[tuple[Any, Callable[[Any, Tensor], None]]] = [
            (reduce.start(given), lambda work, out: work.decode(out)),
            (DenseAllreduce(given, backend).start(given), lambda work, out: work.wait(out)),
            (shard_of.start(shard), lambda work, out: work.wait(out)),
        ]
        flights[0][0].finish()
        for work, write in flights:
            with pytest.raises(InputError, match="tensor 0 must have its elements in places"):
                write(work, odd)
            write(work, out := torch.full_like(given, torch.nan))
            assert bool(out.isfinite().all())
        dense = DenseAllreduce(odd, backend)
        work = dense.start(odd)  # what is only read may share memory
        with pytest.raises(InputError, match="tensor 0 must have its elements in places"):
            work.wait()
        work.wait(out)
        assert bool((out == 1).all())

    run_threads(2, check)


@shared
def test_where_ranks_compare_what_they_bring_all_are_told(make: Callable[[], Tensor]) -> None:
    def check(backend: Backend) -> None:
        odd = make()
        own = odd if backend.rank == 1 else odd.clone(memory_format=torch.contiguous_format)
        residual = Residual()
        shard = torch.zeros(0)
        calls: list[Callable[[], object]] = [
            lambda: compressed_allreduce(own, residual, backend=backend),
            lambda: compressed_all_gather(shard, own, residual, backend=backend),
        ]
        for call in calls:
            expected = InputError if backend.rank == 1 else MismatchError
            with pytest.raises(expected, match=r"rank 1: Compressed\w+: tensor 0 must have its elements in places"):
                call()
        assert bool((own == 1).all())
        assert float(residual.norm()) == 0.0

    run_threads(2, check)


@shared
def test_a_reduce_scatter_only_reads_them(make: Callable[[], Tensor]) -> None:
    def check(backend: Backend) -> None:
        odd = make()
        whole = odd.clone(memory_format=torch.contiguous_format)
        scatter = CompressedReduceScatter(odd, backend)
        assert bits(scatter(odd)) == bits(CompressedReduceScatter(whole, backend)(whole))
        assert bits(compressed_reduce_scatter(odd, backend=backend)) == bits(
            compressed_reduce_scatter(whole, backend=backend)
        )

    run_threads(2, check)


@shared
@pytest.mark.parametrize("kind", [OnebitAdam, OnebitLamb, ZeroOneAdam], ids=lambda kind: kind.__name__)
def test_a_parameter_must_not_be_one(kind: Any, make: Callable[[], Tensor]) -> None:
    freeze = {"var_freeze_step": 2} if kind is ZeroOneAdam else {"freeze_step": 2}
    match = f"{kind.__name__}: parameter 1 must have its elements in places"
    good = Parameter(torch.ones(3))
    with pytest.raises(InputError, match=match):
        kind([good, Parameter(make())], **freeze)
    optimizer = kind([good], **freeze)
    with pytest.raises(InputError, match=match):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2)), Parameter(make())]})
    assert len(optimizer.param_groups) == 1


@shared
def test_clipping_refuses_such_a_gradient_and_scales_none(make: Callable[[], Tensor]) -> None:
    def check(backend: Backend) -> None:
        params = [Parameter(torch.zeros(5)), Parameter(torch.zeros(make().shape))]
        params[0].grad, params[1].grad = torch.ones(5), make()
        sent = backend.traffic.collectives
        with pytest.raises(InputError, match="clip_grad_norm_: gradient 1 must have its elements in places"):
            clip_grad_norm_(params, 0.1, backend=backend)
        assert backend.traffic.collectives == sent
        assert all(bool((p.grad == 1).all()) for p in params)

    run_threads(2, check)
