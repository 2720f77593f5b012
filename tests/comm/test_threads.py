"""What run_threads does with results, errors and ranks that leave, which no other transport has to decide."""

from __future__ import annotations

import threading
import time
import traceback

import pytest
import torch

from onebit.comm.backend import Backend
from onebit.comm.errors import BackendError, TransportError
from onebit.comm.registry import make_backend
from onebit.comm.threads_backend import run_threads

SIZES = (1, 2, 5, 8)


@pytest.mark.parametrize("world_size", SIZES)
def test_results_come_in_rank_order_and_arguments_arrive(world_size: int) -> None:
    def function(backend: Backend, base: int) -> tuple[int, int, str]:
        time.sleep(0.01 * (backend.size - backend.rank))
        return base + backend.rank, backend.size, threading.current_thread().name

    assert run_threads(world_size, function, 10) == [(10 + r, world_size, f"rank {r}") for r in range(world_size)]


def test_world_size_must_be_positive() -> None:
    with pytest.raises(BackendError, match="at least 1, got 0"):
        run_threads(0, lambda backend: None)


def test_the_sum_is_taken_in_rank_order() -> None:
    each = [torch.randn(1000, generator=torch.Generator().manual_seed(rank)) for rank in range(5)]

    def function(backend: Backend) -> torch.Tensor:
        tensor = each[backend.rank].clone()
        backend.all_reduce(tensor).wait()
        return tensor

    expected = (((each[0] + each[1]) + each[2]) + each[3]) + each[4]
    assert all(torch.equal(result, expected) for result in run_threads(5, function))


@pytest.mark.parametrize("culprit", [0, 2])
def test_the_error_of_the_rank_that_failed_is_raised_at_once(culprit: int) -> None:
    def function(backend: Backend) -> None:
        if backend.rank == culprit:
            raise ZeroDivisionError("of this rank's own")
        backend.barrier()

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="of this rank's own") as caught:
        run_threads(3, function)
    assert time.monotonic() - start < 10  # not the timeout of 60
    told = "".join(traceback.format_exception(caught.value))
    assert "raise ZeroDivisionError" in told  # where it happened
    if hasattr(caught.value, "__notes__"):
        assert f"raised by rank {culprit}" in told
        others = [rank for rank in range(3) if rank != culprit]
        assert all(f"rank {rank} failed too, with TransportError" in told for rank in others)
        assert f"rank {culprit} has failed with ZeroDivisionError" in told


def test_of_several_errors_the_lowest_rank_that_failed_by_itself_is_raised() -> None:
    def function(backend: Backend) -> None:
        if backend.rank == 0:
            try:
                backend.barrier()
            except TransportError as error:
                raise RuntimeError("because of another rank") from error
        raise (KeyError if backend.rank == 1 else ValueError)(backend.rank)

    with pytest.raises(KeyError, match="1"):
        run_threads(3, function)


def test_a_rank_that_returns_early_fails_those_that_wait_for_it() -> None:
    def function(backend: Backend) -> None:
        if backend.rank == 1:
            return
        backend.barrier()

    with pytest.raises(TransportError, match=r"rank 0: barrier did not complete.*rank 1 has returned"):
        run_threads(2, function)


def test_what_a_rank_posted_before_it_left_still_arrives() -> None:
    def function(backend: Backend) -> torch.Tensor | None:
        tensor = torch.ones(3)
        work = backend.all_reduce(tensor)
        if backend.rank == 1:
            return None
        time.sleep(0.05)
        work.wait()
        return tensor

    assert torch.equal(run_threads(2, function)[0], torch.full((3,), 2.0))


def test_different_calls_are_told_apart() -> None:
    def function(backend: Backend) -> None:
        if backend.rank == 0:
            backend.all_reduce(torch.zeros(4)).wait()
        else:
            backend.all_gather(torch.zeros(8), torch.zeros(4)).wait()

    with pytest.raises(TransportError, match=r"different collectives.*all_reduce of 4 .*all_gather of 4 "):
        run_threads(2, function)


def test_backend_none_and_threads_mean_the_rank_itself() -> None:
    def function(backend: Backend) -> bool:
        return make_backend() is backend and make_backend("threads") is backend

    assert run_threads(3, function) == [True] * 3
    assert make_backend().name == "single"


def test_an_interrupt_is_raised_at_once_and_ends_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended = threading.Event(), threading.Event()

    def function(backend: Backend) -> None:
        started.set()
        with pytest.raises(TransportError, match="KeyboardInterrupt"):
            backend.barrier()
        ended.set()

    class Interrupted(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            started.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_threads(1 + 1, lambda backend: function(backend) if backend.rank == 0 else started.wait() and time.sleep(1))
    assert ended.wait(10)


def test_gradients_are_not_recorded() -> None:
    def function(backend: Backend) -> bool:
        leaf = torch.ones(2 * backend.size, requires_grad=True)
        output = torch.zeros_like(leaf, requires_grad=False)
        backend.all_to_all(output, leaf).wait()
        return output.requires_grad

    assert run_threads(2, function) == [False, False]
