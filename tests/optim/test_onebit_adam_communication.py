"""What OnebitAdam sends: two collectives a step whatever there is to say, counted in both phases; alone, nothing."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from tests.optim.samples import FREEZE_SOON, contents, gradients, mixed, run, step, values


def test_collectives_do_not_depend_on_which_gradients_are_none_nor_on_the_number_of_parameters() -> None:
    def train(backend: Backend, many: int) -> list[tuple[int, int]]:
        params = [Parameter(torch.zeros(10)) for _ in range(many)]
        optimizer = OnebitAdam(params, freeze_step=2, backend=backend)
        seen = []
        for number in range(4):
            backend.traffic.reset()
            given = [None if backend.rank == 1 or number % 2 else torch.ones(10) for _ in params]
            step(optimizer, given)
            agreed = {0: 1, 2: 1}.get(number, 0) + {0: 1}.get(
                number, 0
            )  # when an average is made, and at the first step
            seen.append((backend.traffic.collectives - agreed, optimizer.stats.collectives))
        return seen

    for many in (1, 3, 200):
        assert run_threads(3, train, many) == [[(2, 2), (2, 4), (2, 6), (2, 8)]] * 3


def test_stats_count_both_phases() -> None:
    numel = 4096

    def train(backend: Backend) -> tuple[int, int, int, int]:
        p = Parameter(torch.zeros(numel))
        optimizer = OnebitAdam([p], freeze_step=2, backend=backend)
        sent = []
        for number in range(5):
            before = optimizer.stats.wire_bytes
            step(optimizer, [values(number, backend.rank, shape=(numel,))])
            sent.append(optimizer.stats.wire_bytes - before)
        stats = optimizer.stats
        assert sent[0] == sent[1]
        assert sent[2] == sent[3] == sent[4] < sent[0] / 30
        assert stats.wire_bytes == sum(sent)
        assert set(stats.seconds) >= {"all_to_all", "all_gather", "encode", "reduce_encode", "update"}
        return stats.calls, stats.collectives, sent[0], sent[2]

    # In warm-up a flag per parameter travels along: 4097 numbers, filled up to a multiple of 2.
    compressed = 2 * (numel // 2 // 8 + 16)
    assert run_threads(2, train) == [(5, 10, 4 * (numel + 2), compressed)] * 2


def test_codec_and_bucket_size_do_not_matter_to_one_rank_which_sends_nothing() -> None:
    def train(backend: Backend) -> None:
        coarse = {**FREEZE_SOON, "codec": SignCodec(block_size=None, scale="rms"), "bucket_mb": 1e-3}
        assert run(backend, 9, contents, gradients, mixed, coarse) == run(
            backend, 9, contents, gradients, mixed, FREEZE_SOON
        )
        assert backend.traffic.collectives == backend.traffic.wire_bytes == 0

    run_threads(1, train)
