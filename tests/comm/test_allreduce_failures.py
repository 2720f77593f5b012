"""A transport that fails, and a rank that ends, leave the others' tensors as they are and lose no error feedback."""

from __future__ import annotations

import pytest
import torch

from onebit.comm import Backend, CompressedAllreduce, TransportError, run_threads
from onebit.compress import SignCodec
from tests.comm import oracle
from tests.comm.samples import CODECS, SMALL_BUCKET, bits, samples


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("operation", ["_all_to_all", "_all_gather"])
def test_a_transport_that_fails_leaves_tensors_as_they_are_and_puts_feedback_back(
    operation: str, codec: SignCodec
) -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend, codec)
        reduce(samples(backend.rank, 0))
        before = reduce.state_dict()
        tensors = samples(backend.rank, 1)
        setattr(backend, operation, lambda output, input: 1 / 0)
        with pytest.raises(TransportError, match=f"rank {backend.rank}: {operation[1:]} did not complete"):
            reduce(tensors)
        delattr(backend, operation)
        assert bits(tensors) == bits(samples(backend.rank, 1))
        after = reduce.state_dict()
        for part in ("worker", "server"):  # the bound of the test of undo in test_allreduce_work, over all tensors
            largest = 2 * max(float(state[part].abs().max()) if state[part].numel() else 0 for state in (before, after))
            largest += max(float(t.float().abs().max()) for t in tensors if t.numel())
            assert torch.allclose(after[part], before[part], rtol=0, atol=20 * oracle.UNIT * largest)
        with pytest.raises(TransportError, match=f"an earlier {operation[1:]} of this group failed"):
            reduce(tensors)
        assert bits(tensors) == bits(samples(backend.rank, 1))

    run_threads(2, check)


def test_a_rank_that_ends_fails_the_others_calls_and_their_feedback_is_put_back() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend, bucket_mb=SMALL_BUCKET)
        reduce(samples(backend.rank, 0))
        if backend.rank == 1:
            return
        before = reduce.state_dict()
        tensors = samples(backend.rank, 1)
        for _ in range(2):
            with pytest.raises(TransportError, match=f"rank {backend.rank}: .* did not complete"):
                reduce(tensors)
            assert bits(tensors) == bits(samples(backend.rank, 1))
        largest = 2 * float(before["worker"].abs().max()) + max(float(t.abs().max()) for t in tensors if t.numel())
        assert torch.allclose(reduce.state_dict()["worker"], before["worker"], rtol=0, atol=20 * oracle.UNIT * largest)

    run_threads(3, check)
