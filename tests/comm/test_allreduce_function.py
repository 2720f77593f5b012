"""The average as a function: with a residual the object called again and again, without one it forgets its error."""

from __future__ import annotations

import torch

from onebit.comm import Backend, Residual, compressed_allreduce, run_threads
from tests.comm.samples import CODECS, bits, normal, samples, trace


def test_the_function_with_a_residual_is_the_object_called_again_and_again() -> None:
    def by_function(backend: Backend) -> list[list[bytes]]:
        residual = Residual()
        outputs = []
        for call in range(3):
            tensors = samples(backend.rank, call)
            assert compressed_allreduce(tensors, residual, backend=backend, codec=CODECS["64 mean"]) is tensors
            outputs.append(bits(tensors))
        assert float(residual.norm()) > 0
        return outputs

    for world_size in (1, 2, 3):
        expected = run_threads(world_size, trace, CODECS["64 mean"], 3)
        if world_size > 1:
            assert run_threads(world_size, by_function) == [list(map(bits, seen.outputs)) for seen in expected]


def test_the_function_without_a_residual_forgets_its_error() -> None:
    def twice(backend: Backend) -> None:
        first, second, alone = normal(backend.rank), normal(backend.rank), normal(backend.rank)
        compressed_allreduce(first)  # inside run_threads None is the thread's own backend
        compressed_allreduce(second, backend="threads")
        compressed_allreduce([alone], backend=backend)
        assert bits(first) == bits(second) == bits(alone)

    run_threads(2, twice)


def test_error_feedback_makes_the_mean_of_many_calls_right_where_one_call_is_far_off() -> None:
    calls = 200
    tensors = [normal(rank, 1) for rank in range(2)]
    exact = torch.stack(tensors).mean(0)

    def repeat(backend: Backend, residual: Residual | None) -> float:
        total = torch.zeros(3000)
        for _ in range(calls):
            x = tensors[backend.rank].clone()
            total += compressed_allreduce(x, residual, backend=backend)
        return float(torch.linalg.vector_norm(total / calls - exact) / torch.linalg.vector_norm(exact))

    with_feedback = run_threads(2, lambda backend: repeat(backend, Residual()))[0]
    without = run_threads(2, repeat, None)[0]
    # What is left is the last residual, some ten times an input that never changes, over the number of calls.
    assert with_feedback < 0.1
    assert without > 0.5
