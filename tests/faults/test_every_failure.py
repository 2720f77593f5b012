"""A step in which any one collective fails to start or to come leaves everything as it was, and can be made later."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from onebit.comm import Backend, TransportError
from onebit.compress import SignCodec
from onebit.optim import CompressedOptimizer
from tests.faults.replay import Failure, Replay, ReplayBackend, record
from tests.faults.training import MAKERS, Moment, give_gradients, make
from tests.optim.samples import all_params

STEPS = 8  # which meet every phase of every optimizer, and an interval of 0/1 Adam with a local step


def step(optimizer: CompressedOptimizer, rank: int, number: int) -> None:
    """With the gradients of `training`, which a backward computes, so that what is sent during one is."""
    give_gradients(optimizer, rank, number)
    given = [(p, p.grad) for p in all_params(optimizer)]
    optimizer.zero_grad()
    sum((p * g).sum() for p, g in given if g is not None).backward()
    optimizer.step()


def feedback(optimizer: CompressedOptimizer) -> list[Tensor]:
    """The buffers themselves."""
    residuals = [reducers.residual for reducers in optimizer._of_groups()]
    return [part for residual in residuals for part in (*residual.worker, *residual.server)]


def _has(name: str, options: dict[str, Any]) -> bool:
    """Whether this optimizer has these options."""
    return "shard" not in options or name == "OnebitAdam"


# The options of the optimizer, and the error of the collective.
CASES: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "plain": ({}, Failure),
    "interrupted": ({}, KeyboardInterrupt),
    "overlap": ({"overlap": True}, Failure),
    "two levels": ({"local_group": 2}, Failure),
    "slices": ({"local_group": 2, "shard": True}, Failure),
    "slices, unfused": ({"local_group": 2, "shard": True, "codec": SignCodec(kernels="reference")}, Failure),
}
RUNS = [(name, case) for case, (options, _) in CASES.items() for name in MAKERS if _has(name, options)]


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_it_leaves_a_rank_as_it_was_before(name: str, case: str) -> None:
    options, error = CASES[case]
    world_size = 4 if "local_group" in options else 2
    rank = 0 if case == "plain" else world_size - 1

    def made(backend: Backend) -> CompressedOptimizer:
        return make(name, backend, **options)

    recorded = record(made, step, world_size, STEPS)[rank]
    replay = Replay(recorded.tape)
    backend = ReplayBackend(rank, world_size, replay)
    optimizer = made(backend)
    expected = TransportError if error is Failure else error
    failed = 0
    for number in range(STEPS):
        kept = [part.clone() for part in feedback(optimizer)]
        # Who overlaps learns an order in its first step, once: then that step cannot be made again as it was recorded.
        fatal = None if "overlap" in options and number == 0 else 0
        while True:
            where = f"step {number}, event {fatal}"
            backend.mend()
            replay.rewind(number, fatal, error)
            try:
                step(optimizer, rank, number)
                break
            except expected:
                failed += 1
            assert fatal is not None
            assert not Moment.of(optimizer).misfits(recorded.moments[number]), where
            replay.litter()
            assert not Moment.of(optimizer).misfits(recorded.moments[number]), f"{where}, with bytes that came later"
            for i, part in enumerate(feedback(optimizer)):  # to the last bit, so that what follows can be compared
                part.copy_(kept[i]) if kept else part.zero_()
            fatal += 1
        assert fatal is None or replay.events == fatal, f"step {number}: a failure was lost"
        assert Moment.of(optimizer).equals(recorded.moments[number + 1]), f"after step {number}"
    assert failed > 10 * (STEPS - 2)  # but for the local one
