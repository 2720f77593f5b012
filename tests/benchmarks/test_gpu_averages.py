"""What a benchmark on GPUs holds averages against, which needs no GPU: bytes, the right result, and ratios of times."""

from __future__ import annotations

import pytest
import torch

from onebit.benchmarks.gpu_averages import Way, compare, normal
from onebit.benchmarks.gpu_averages import _right_average as right_average
from onebit.benchmarks.gpu_timing import MI, make_row
from onebit.benchmarks.row import Row
from onebit.comm import Backend, run_threads
from onebit.compress import Int8Codec, SignCodec

RANKS, NUMEL = 4, MI  # whole chunks of whole blocks, so that nothing is padded
WAYS = [
    Way(codec, name, local)
    for codec, name in ((SignCodec(), ""), (Int8Codec(error_feedback=False), " int8"))
    for local in (1, 2)
]


def test_rows_tell_what_carries_payloads() -> None:
    assert str(Way(SignCodec())) == "compressed"
    assert str(Way(SignCodec(), local=2, alone=True)) == "compressed, nodes of 2, by NCCL alone"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_bytes_that_a_rank_must_send_are_those_that_it_sends(way: Way) -> None:
    def sent(backend: Backend) -> int:
        average = way.average(torch.zeros(NUMEL), backend)
        average(torch.zeros(NUMEL))
        return average.stats.wire_bytes - average.stats.local_bytes - way.wire_bytes(NUMEL, backend)

    assert run_threads(RANKS, sent) == [0] * RANKS


def test_what_is_right_is_near_the_mean() -> None:
    """int8 of a block is within half of a 127th of its largest magnitude, twice, and the mean's are below 6."""
    mean = torch.stack([normal(NUMEL, rank) for rank in range(RANKS)]).mean(0)
    [_, way] = [way for way in WAYS if way.name]
    far = (right_average(way, NUMEL, torch.float32, RANKS, 1) - mean).abs().max()
    assert 0 < far < 2 * 6 / 127 / 2


def test_ratios_are_of_times_and_to_nccl_on_as_many_elements_in_the_same_manner() -> None:
    def row(case: str, dtype: torch.dtype, numel: int, seconds: float) -> Row:
        return make_row(case, dtype, numel, numel * dtype.itemsize, [seconds] * 3, None)

    fp32, bf16 = torch.float32, torch.bfloat16
    ours, replayed = row("compressed int8", fp32, 8, 2.0), row("compressed int8, graph", fp32, 8, 0.5)
    theirs = [row("nccl", fp32, 8, 5.0), row("nccl", bf16, 8, 3.0), row("nccl, graph", fp32, 8, 4.0)]
    compare([ours, replayed, *theirs, row("nccl", fp32, 9, 100.0)])
    assert {role: spread.median for role, spread in ours.ratios.items()} == {"NCCL float32": 2.5, "NCCL bfloat16": 1.5}
    assert {role: spread.median for role, spread in replayed.ratios.items()} == {"NCCL float32": 8.0}
    assert not any(other.ratios for other in theirs)
