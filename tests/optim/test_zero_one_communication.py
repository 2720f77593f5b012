"""ZeroOneAdam is silent in local steps, and sends in the others what the formula says and the paper promises."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam, ZeroOneAdam
from onebit.optim.policies import SyncPolicy
from tests.comm.oracle import wire_bytes
from tests.optim.samples import contents, gradients, mixed, step, values
from tests.optim.zero_one_runs import KINDS, SOON, run


@pytest.mark.parametrize("many", [1, 40])
@pytest.mark.parametrize("world_size", [2, 3])
def test_local_steps_communicate_nothing_and_others_what_the_formula_says(world_size: int, many: int) -> None:
    numels = [1500] * many

    def train(backend: Backend) -> list[tuple[str, int, int]]:
        params = [Parameter(torch.zeros(n)) for n in numels]
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        seen = []
        for number in range(len(KINDS)):
            kind = optimizer.phase()
            backend.traffic.reset()
            given = [values(i, number, backend.rank, shape=(1500,)) for i in range(many)]
            if number > 12:  # neither does it matter who has a gradient
                given[backend.rank % many] = None  # type: ignore[call-overload]
            step(optimizer, given)
            seen.append((kind, backend.traffic.collectives, backend.traffic.wire_bytes))
        return seen

    for seen in run_threads(world_size, train):
        assert [kind for kind, _, _ in seen] == KINDS
        assert {(c, b) for kind, c, b in seen if kind == "local"} == {(0, 0)}
        settled = [(c, b) for kind, c, b in seen[8:] if kind == "sync"]
        assert set(settled) == {(2, wire_bytes(world_size, numels))}


@pytest.mark.parametrize("world_size", [2])
def test_the_published_schedule_sends_26_times_less_than_fp32_adamw_in_half_as_many_rounds(world_size: int) -> None:
    # BERT-Large's 152,000 steps scaled down to 2,280, with as many variance steps per doubling as leaves about as many.
    steps, numel = 2280, 16 * 1024
    shape = {
        "var_freeze_step": 12_500 * steps // 152_000,
        "local_step_scaler": 32_678 * steps // 152_000,
        "var_update_scaler": 4,
    }

    def train(backend: Backend) -> tuple[int, int, int]:
        p = Parameter(torch.ones(numel))
        optimizer = ZeroOneAdam([p], backend=backend, weight_decay=0.0, **shape)
        p.grad = values(backend.rank, shape=(numel,))
        rounds = 0
        for _ in range(steps):
            before = backend.traffic.collectives
            optimizer.step()
            rounds += backend.traffic.collectives > before
        return backend.traffic.wire_bytes, rounds, optimizer.stats.dense_bytes

    def adamw(backend: Backend) -> int:
        p = Parameter(torch.ones(numel))
        optimizer = OnebitAdam([p], freeze_step=99, backend=backend)
        p.grad = torch.ones(numel)
        optimizer.step()
        backend.traffic.reset()
        optimizer.step()
        return backend.traffic.wire_bytes

    per_step = run_threads(world_size, adamw)[0]  # 4 bytes per element on two ranks, and one flag per parameter
    assert per_step == 4 * (numel + 2)
    for sent, rounds, _ in run_threads(world_size, train):
        assert rounds == SyncPolicy(**{k: v for k, v in shape.items() if k != "var_update_scaler"}).count(steps)
        assert rounds <= 0.5 * steps
        assert steps * per_step / sent >= 26


def test_one_rank_communicates_nothing_and_neither_codec_nor_gaps_matter_to_it() -> None:
    def train(backend: Backend) -> None:
        other = {**SOON, "local_step_clipper": 1, "codec": SignCodec(block_size=64), "bucket_mb": 1e-3}
        usual = run(backend, 23, contents, gradients, mixed)
        assert run(backend, 23, contents, gradients, mixed, other) == usual
        assert backend.traffic.collectives == backend.traffic.wire_bytes == 0

    run_threads(1, train)
