"""Error feedback of two levels goes on bit for bit, moves to other nodes or one level, and fits no other slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from onebit.comm import Backend, CompressedAllreduce, InputError, Residual, run_threads
from tests.comm import oracle
from tests.comm.nodes import CODEC
from tests.comm.samples import NUMELS, SMALL_BUCKET, bits, normal, residual_bits, samples, server_parts, worker_parts


def test_states_go_on_bit_for_bit_and_reshard_to_other_nodes_or_to_one_level() -> None:
    def run(backend: Backend, states: list[dict[str, Any]] | None) -> tuple[list[bytes], dict[str, Any]]:
        reduce = CompressedAllreduce(samples(0, 0), backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET)
        for call in range(2) if states is None else ():
            reduce(samples(backend.rank, call))
        saved = reduce.state_dict()
        if states is not None:
            reduce.load_state_dict(states[backend.rank])
        x = samples(backend.rank, 2)
        reduce(x)
        return bits(x), saved

    straight = run_threads(6, run, None)
    states = [saved for _, saved in straight]
    resumed = run_threads(6, run, states)
    assert [x for x, _ in resumed] == [x for x, _ in straight]

    def total(parts: list[Mapping[str, Any]], nodes: int) -> list[oracle.Floats]:
        """What feedback adds to the mean, per tensor."""
        worker = [np.sum([worker_parts(p)[t] for p in parts], axis=0) / nodes for t in range(len(NUMELS))]
        return [w + s for w, s in zip(worker, server_parts(parts), strict=True)]

    def load(backend: Backend, new: list[dict[str, Any]], k: int | None) -> dict[str, Any]:
        residual = Residual()
        residual.load_state_dict(new[backend.rank // (k or 1)])
        reduce = CompressedAllreduce(samples(0, 0), backend, CODEC, local_group=k, residual=residual)
        return reduce.state_dict()

    before = total(states, 3)
    for nodes, k in ((3, 2), (2, 2), (2, 3), (4, None)):  # the same, fewer and larger nodes, no nodes
        held = run_threads(nodes * (k or 1), load, Residual.reshard(states, nodes), k)
        for one, other in zip(before, total(held, nodes), strict=True):
            # A mean of three is rounded once.
            assert np.all(np.abs(one - other) <= 4 * oracle.UNIT * np.abs(one).max(initial=0))
    with pytest.raises(InputError, match="expected one state of each of 3 ranks"):
        Residual.reshard(states[:-1], 2)
    with pytest.raises(InputError, match="expected one state of each of 3 ranks"):
        Residual.reshard([*states[:-1], states[0]], 2)


def test_a_state_of_another_slice_is_refused() -> None:
    def load(backend: Backend, states: list[dict[str, Any]] | None) -> dict[str, Any]:
        reduce = CompressedAllreduce(torch.zeros(9000), backend, CODEC, local_group=2)
        reduce(normal(backend.rank, numel=9000))
        if states is not None:
            before = residual_bits(reduce.residual)
            with pytest.raises(InputError, match="another bucket size, block size or local_group"):
                reduce.load_state_dict(states[backend.rank ^ 1])
            with pytest.raises(InputError, match="the residual to load has rank"):
                reduce.load_state_dict(states[backend.rank ^ 2])
            assert residual_bits(reduce.residual) == before
        return reduce.state_dict()

    run_threads(4, load, run_threads(4, load, None))
