"""What an average takes: parameters, lists without elements, and no other tensors than it was made for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, InputError, compressed_allreduce, run_threads
from onebit.compress import SignCodec
from tests.comm.samples import bits, normal


def test_a_parameter_that_requires_grad_is_averaged_in_place() -> None:
    def average(backend: Backend) -> bytes:
        parameter = torch.nn.Parameter(normal(backend.rank))
        CompressedAllreduce(parameter, backend)(parameter)
        assert parameter.grad_fn is None
        return bits(parameter)[0]

    averaged = run_threads(2, average)
    assert averaged[0] == averaged[1] != bits(normal(0))[0]


def test_lists_without_elements_are_averaged_and_saved() -> None:
    def average(backend: Backend, tensors: list[Tensor]) -> None:
        reduce = CompressedAllreduce(tensors, backend)
        reduce.load_state_dict(reduce.state_dict())
        reduce(tensors)
        work = reduce.start(tensors)
        work.finish()
        assert bool(work.all_finite())
        work.undo()
        assert float(reduce.residual.norm()) == 0.0
        state = reduce.state_dict()
        reduce.load_state_dict(state)
        CompressedAllreduce(tensors, backend).load_state_dict(state)

    for tensors in ([], [torch.empty(0)], [torch.empty(0, 3), torch.empty(0, dtype=torch.float16)]):
        run_threads(2, average, tensors)


def test_other_tensors_than_it_was_made_for_are_refused_and_nothing_changes() -> None:
    def check(backend: Backend) -> None:
        like = [torch.zeros(5), torch.zeros(2, 3)]
        reduce = CompressedAllreduce(like, backend)
        wrong: list[tuple[list[Tensor], str]] = [
            ([torch.ones(5)], "made for 2 tensors, called with 1"),
            ([torch.ones(5), torch.ones(6)], r"tensor 1 was float32 \(2, 3\).*is float32 \(6,\)"),
            ([torch.ones(5).half(), torch.ones(2, 3)], r"tensor 0 was float32 \(5,\).*is float16 \(5,\)"),
        ]
        for tensors, message in wrong:
            with pytest.raises(InputError, match=f"rank {backend.rank}: {message}"):
                reduce(tensors)
            assert all(bool((t == 1).all()) for t in tensors)
        with pytest.raises(InputError, match="expected a tensor or a list of tensors, got str at position 1"):
            reduce([torch.ones(5), "x"])  # type: ignore[list-item]
        with pytest.raises(InputError, match=r"got NoneType at position 1; for a gradient .* pass zeros"):
            reduce([torch.ones(5), None])  # type: ignore[list-item]
        assert reduce.stats.calls == 0
        assert float(reduce.residual.norm()) == 0.0
        with pytest.raises(InputError, match=r"residual must be .* got SignCodec; .* codec= and backend="):
            compressed_allreduce(torch.ones(5), SignCodec(), backend=backend)  # type: ignore[arg-type]

    run_threads(2, check)
