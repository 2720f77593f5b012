"""What metrics say of the size of an update is what NumPy makes of the moments that are saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import Int8Codec
from onebit.optim import OnebitAdam
from tests.optim.samples import step

SHAPES = ((40, 50), (7,), (0,), (3, 500))
FREEZE = 2
SMALL = 4 * 1024 / 2**20  # MiB of buckets of 1024 elements, fewer than the largest tensor has

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "one bucket": (2, {}),
    "tensors in several buckets": (2, {"bucket_mb": SMALL}),
    "by torch's operations": (2, {"codec": Int8Codec()}),
    "without bias correction": (2, {"bias_correction": False}),
    "refreshed": (2, {"variance_refresh": 2}),
    "two levels": (4, {"local_group": 2, "bucket_mb": SMALL}),
    "slices": (4, {"local_group": 2, "shard": True, "bucket_mb": SMALL}),
    "slices, by torch's operations": (4, {"local_group": 2, "shard": True, "codec": Int8Codec()}),
    "slices of one node": (2, {"local_group": 2, "shard": True}),
}


def updates(optimizer: OnebitAdam) -> list[np.ndarray]:
    """Of every parameter with elements here, the last update before the learning rate, in float64."""
    saved = optimizer.state_dict()
    found = []
    for group in saved["param_groups"]:
        beta1, beta2 = group["betas"]
        for state in (saved["state"][i] for i in group["params"] if i in saved["state"]):
            m, v = (state[key].numpy().astype(np.float64) for key in ("exp_avg", "exp_avg_sq"))
            if group["bias_correction"]:
                m, v = m / (1 - beta1 ** float(state["step"])), v / (1 - beta2 ** float(state["variance_step"]))
            found.append(m / (np.sqrt(v) + group["eps"]))
    return [update for update in found if update.size]


def gradients(seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) * 10.0**i for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_root_mean_square_of_the_update_of_what_a_rank_holds(case: str) -> None:
    ranks, options = CASES[case]

    def train(backend: Backend) -> None:
        params = [Parameter(torch.ones(shape)) for shape in SHAPES]
        groups = [{"params": params[:2]}, {"params": params[2:], "compress": case != "one bucket"}]
        optimizer = OnebitAdam(groups, freeze_step=FREEZE, backend=backend, **options)
        assert "update_rms" not in optimizer.metrics(update_rms=True)  # there is no variance
        for number in range(2 * FREEZE + 1):
            step(optimizer, gradients(100 * number + backend.rank))
            found, expected = optimizer.metrics(update_rms=True), updates(optimizer)
            whole = np.sqrt(np.mean(np.concatenate([u.ravel() for u in expected]) ** 2))
            largest = max(np.sqrt(np.mean(u**2)) for u in expected)
            # fp32 roots, quotients and sums of at most 3,507 squares.
            assert found["update_rms"] == pytest.approx(whole, rel=1e-5), (backend.rank, number)
            assert found["largest_update_rms"] == pytest.approx(largest, rel=1e-5), (backend.rank, number)
            assert "update_rms" not in optimizer.metrics()

    run_threads(ranks, train)


def test_asking_changes_no_step() -> None:
    def train(backend: Backend, asked: bool) -> list[torch.Tensor]:
        params = [Parameter(torch.ones(shape)) for shape in SHAPES]
        optimizer = OnebitAdam(params, freeze_step=FREEZE, backend=backend, bucket_mb=SMALL)
        for number in range(2 * FREEZE + 1):
            step(optimizer, gradients(100 * number + backend.rank))
            if asked:
                optimizer.metrics(update_rms=True)
        return [p.detach() for p in params]

    for asked, silent in zip(*(run_threads(2, train, asked) for asked in (True, False)), strict=True):
        assert all(map(torch.equal, asked, silent))


def test_it_grows_where_gradients_grow_after_the_freeze() -> None:
    def train(backend: Backend) -> list[float]:
        params = [Parameter(torch.ones(shape)) for shape in SHAPES]
        optimizer = OnebitAdam(params, freeze_step=FREEZE, backend=backend)
        sizes = []
        for number in range(12):
            step(optimizer, [g * 2.0 ** max(0, number - FREEZE) for g in gradients(backend.rank)])
            sizes.append(float(optimizer.metrics(update_rms=True)["update_rms"]))
        return sizes

    for sizes in run_threads(2, train):
        assert sizes[-1] > 10 * sizes[FREEZE]
