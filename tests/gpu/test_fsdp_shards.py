"""1-bit Adam over replicas of shards on GPUs: the model holds what the optimizer made, also where no host waits."""

from __future__ import annotations

import functools
import math
from itertools import product

import pytest
import torch

from onebit.comm import Backend
from tests.comm.fsdp_runs import hybrid_mesh
from tests.comm.fsdp_shards import KINDS, Shards, differences, train
from tests.comm.launcher import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
SIZES = [
    pytest.param(2, id="2 replicas of 1"),
    pytest.param(4, id="2 of 2", marks=pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs 4 GPUs")),
]
UNEVEN = {"whole blocks": False, "uneven": True}
Run = tuple[str, str, bool]


def all_runs(backend: Backend) -> dict[Run, Shards]:
    mesh = hybrid_mesh("cuda")
    return {
        (kind, shape, waits): train(backend, "cuda", kind, 1024, UNEVEN[shape], waits, mesh)
        for kind, shape, waits in product(KINDS, UNEVEN, (False, True))
    }


@functools.cache
def seen(world_size: int) -> list[dict[Run, Shards]]:
    return run_ranks("nccl", world_size, all_runs, timeout=240.0)


@pytest.mark.parametrize("shape", UNEVEN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", SIZES)
def test_the_model_holds_what_the_optimizer_has_made_of_its_gradients(world_size: int, kind: str, shape: str) -> None:
    ranks = seen(world_size)
    for rank, runs in enumerate(ranks):
        ahead, waiting = (runs[kind, shape, waits] for waits in (False, True))
        replica = ranks[rank % (world_size // 2)][kind, shape, False]
        found = {
            "moved": [str(run.moved) for run in (ahead, waiting) if run.moved],
            "model and twin, host ahead": differences(ahead.model, ahead.twin),
            "model and twin, host waiting": differences(waiting.model, waiting.twin),
            "host ahead and host waiting": differences(ahead.model, waiting.model),
            "this replica and the first": differences(ahead.model, replica.model),
            "skipped": [str(run.skipped) for run in (ahead, waiting) if any(run.skipped)],
        }
        stories = f"\nahead: {ahead.story()}\nwaiting: {waiting.story()}"
        assert not any(found.values()), f"rank {rank}: { {what: how for what, how in found.items() if how} }{stories}"
        assert all(map(math.isfinite, ahead.losses)), stories
