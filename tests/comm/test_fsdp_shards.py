"""1-bit Adam over replicas of shards, as docs/recipes/fsdp.md has it: the model holds what the optimizer has made."""

from __future__ import annotations

import pytest

from tests.comm.fsdp_shards import KINDS, differences, train
from tests.comm.launcher import run_ranks


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_holds_what_the_optimizer_has_made_of_its_gradients_and_replicas_stay_equal(kind: str) -> None:
    ranks = run_ranks("gloo", 4, train, "cpu", kind, 32, True, timeout=120.0)
    for rank, found in enumerate(ranks):
        assert not found.moved, rank
        assert not differences(found.model, found.twin), (rank, found.story())
        assert not differences(found.model, ranks[rank % 2].model), rank
        assert not any(found.skipped)
    # It learns after the freeze, too: the loss starts at more than 1, that of the inputs themselves.
    assert all(found.losses[-1] < found.losses[5] < found.losses[0] for found in ranks), [r.losses for r in ranks]
