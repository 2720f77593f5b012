"""A parameter that is not the same on all ranks is found, and named, by one small collective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, MismatchError, run_threads
from onebit.compress import InputError
from onebit.optim import CompressedOptimizer, OnebitAdam, OnebitLamb, ZeroOneAdam, check_replicas
from onebit.optim.replicas import checksums
from tests.optim.samples import gradients, parameters, step, values

MAKERS: dict[str, Any] = {
    "OnebitAdam": lambda params, **options: OnebitAdam(params, freeze_step=2, **options),
    "OnebitLamb": lambda params, **options: OnebitLamb(params, freeze_step=2, **options),
    "ZeroOneAdam": lambda params, **options: ZeroOneAdam(
        params, var_freeze_step=2, local_step_scaler=1, local_step_clipper=4, **options
    ),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_replicas_pass_in_every_phase_for_one_collective_of_32_bytes(name: str, dtype: torch.dtype) -> None:
    def train(backend: Backend) -> None:
        optimizer = MAKERS[name](parameters(dtype=dtype), backend=backend, master_weights=dtype != torch.float32)
        for number in range(9):  # of ZeroOneAdam some end within an interval, where ranks differ
            step(optimizer, gradients(parameters(), backend.rank, number))
            before, sent = backend.traffic.collectives, backend.traffic.wire_bytes
            check_replicas(optimizer)
            assert backend.traffic.collectives == before + 1
            assert backend.traffic.wire_bytes == sent + 32 * (backend.size - 1)

    run_threads(3, train)


def drifted(backend: Backend, **options: Any) -> OnebitAdam:
    """An optimizer of which rank 1 has changed two elements by opposite amounts, so that no plain sum tells."""
    optimizer = OnebitAdam(parameters(), freeze_step=2, backend=backend, **options)
    step(optimizer, gradients(parameters(), backend.rank, 0))
    if backend.rank == 1:
        words = optimizer.param_groups[0]["params"][3].detach().view(torch.int32)
        words[5] += 1
        words[6] -= 1
    return optimizer


def test_the_first_parameter_that_differs_and_the_ranks_are_named_on_every_rank() -> None:
    def train(backend: Backend) -> str:
        optimizer = drifted(backend)
        with pytest.raises(MismatchError) as caught:
            check_replicas(optimizer)
        return str(caught.value)

    for rank, message in enumerate(run_threads(3, train)):
        assert message.startswith(f"rank {rank}: OnebitAdam: check of replicas: ranks do not agree on parameter 3 of ")
        assert "of group 0: ranks 0, 2: checksum " in message
        assert "; rank 1: checksum " in message
        assert message.endswith("make them equal with onebit.comm.broadcast")


def test_named_parameters_are_called_by_their_names() -> None:
    def train(backend: Backend) -> None:
        optimizer = OnebitAdam([("stem.weight", Parameter(torch.ones(3)))], freeze_step=2, backend=backend)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].add_(backend.rank)
        with pytest.raises(MismatchError, match=r"parameter 0 of group 0 \(stem.weight\): rank 0: checksum"):
            check_replicas(optimizer)

    run_threads(2, train)


def test_fp32_masters_are_compared_where_parameters_of_half_precision_hide_a_difference() -> None:
    def train(backend: Backend) -> None:
        optimizer = OnebitAdam(parameters(dtype=torch.bfloat16), freeze_step=2, master_weights=True, backend=backend)
        step(optimizer, gradients(parameters(), backend.rank, 0))
        check_replicas(optimizer)
        if backend.rank == 0:
            p = optimizer.param_groups[0]["params"][5]
            optimizer.state[p]["master"][0, 0, 0, 0] += 1e-7
        with pytest.raises(MismatchError, match="the fp32 master of parameter 5 of group 0: rank 0: "):
            check_replicas(optimizer)

    run_threads(2, train)


@pytest.mark.parametrize("name", MAKERS)
def test_check_every_k_raises_after_the_next_kth_step_and_never_before(name: str) -> None:
    def train(backend: Backend) -> None:
        optimizer: CompressedOptimizer = MAKERS[name](parameters(), backend=backend, check_every=3)
        for number in range(3):
            step(optimizer, gradients(parameters(), backend.rank, number))
        if backend.rank == 1:
            p = optimizer.param_groups[0]["params"][0]
            for tensor in (p.detach(), *(v for k, v in optimizer.state[p].items() if k == "interval_start")):
                tensor.view(-1)[0] += 1
        for number in (3, 4):
            step(optimizer, gradients(parameters(), backend.rank, number))
        with pytest.raises(MismatchError, match="ranks do not agree on parameter 0 of group 0"):
            step(optimizer, gradients(parameters(), backend.rank, 5))
        assert optimizer.param_groups[0]["step"] == 6  # the step itself was made

    run_threads(2, train)


def test_without_check_every_a_step_makes_no_collective_more() -> None:
    def train(backend: Backend) -> list[int]:
        counts = []
        for every in (None, 2):
            optimizer = OnebitAdam(parameters(), freeze_step=1, backend=backend, check_every=every)
            before = backend.traffic.collectives
            for number in range(4):
                step(optimizer, gradients(parameters(), backend.rank, number))
            counts.append(backend.traffic.collectives - before)
        return counts

    for without, with_it in run_threads(2, train):
        assert with_it == without + 2


def test_ranks_with_another_check_every_get_an_error_at_the_first_step_and_do_not_hang() -> None:
    def train(backend: Backend) -> None:
        optimizer = OnebitAdam(parameters(), freeze_step=1, backend=backend, check_every=2 + backend.rank)
        with pytest.raises(MismatchError, match="ranks do not agree on check_every: rank 0: 2; rank 1: 3"):
            step(optimizer, gradients(parameters(), backend.rank, 0))

    run_threads(2, train)


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "2"])
def test_a_check_every_that_is_no_count_is_refused(every: Any) -> None:
    with pytest.raises(InputError, match="check_every must be None or an int of at least 1"):
        OnebitAdam([Parameter(torch.ones(1))], freeze_step=1, check_every=every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_checksum_tells_swapped_elements_and_opposite_errors_apart_and_knows_no_strides(dtype: torch.dtype) -> None:
    whole = values(3, shape=(40, 50)).to(dtype)
    swapped, opposite = whole.clone(), whole.clone()
    swapped.view(-1)[[7, 1999]] = whole.view(-1)[[1999, 7]]
    words = opposite.view(-1).view(torch.int32 if dtype == torch.float32 else torch.int16)
    words[10] += 3
    words[30] -= 3
    apart = checksums([whole, swapped, opposite, whole[:, :49], -whole])
    assert len(set(apart)) == 5
    assert checksums([whole.t().contiguous().t(), torch.empty(0, dtype=dtype)])[0] == apart[0]


def test_elements_that_are_far_apart_do_not_cancel_either() -> None:
    large = torch.zeros((1 << 20) + 7, dtype=torch.int32)
    first, last = large.clone(), large.clone()
    first[3] = 1
    last[(1 << 20) + 3] = 1  # the same place of the next piece
    assert len(set(checksums([t.view(torch.float32) for t in (large, first, last)]))) == 3
