"""What DeepSpeed's average must give is known here, so that a peer is timed on what it says it does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from onebit.benchmarks import select
from onebit.benchmarks.peers import padded, wrong_average


def average(inputs: list[Tensor]) -> Tensor:
    """DeepSpeed's, in float32: one scale a rank, then one a rank's part."""
    ranks, numel = len(inputs), inputs[0].numel()
    whole = [torch.nn.functional.pad(x, (0, padded(numel, ranks) - numel)) for x in inputs]
    signs = [torch.where(x >= 0, 1.0, -1.0) for x in whole]
    scales = [torch.linalg.norm(x) / math.sqrt(x.numel()) for x in whole]
    parts = sum(s * scale / ranks for s, scale in zip(signs, scales, strict=True)).view(ranks, -1)
    out = [torch.linalg.norm(part) / math.sqrt(part.numel()) * torch.where(part >= 0, 1.0, -1.0) for part in parts]
    return torch.cat(out)[:numel]


def inputs(ranks: int, numel: int) -> list[Tensor]:
    return [torch.randn(numel, generator=torch.Generator().manual_seed(rank)) for rank in range(ranks)]


@pytest.mark.parametrize("numel", [1, 64, 1000])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_its_average_is_right(ranks: int, numel: int) -> None:
    given = inputs(ranks, numel)
    assert wrong_average(given, average(given)) == 0


def test_a_wrong_sign_a_wrong_scale_and_the_exact_mean_are_counted() -> None:
    given = inputs(3, 999)
    flipped, scaled = average(given), average(given)
    flipped[7] *= -1
    scaled[11] *= 1.001
    assert (wrong_average(given, flipped), wrong_average(given, scaled)) == (1, 1)
    assert wrong_average(given, sum(given) / 3) > 900


def test_peers_are_compared_in_one_run_on_cuda() -> None:
    [cases] = select(["peers"])
    assert {case.devices for case in cases} == {("cuda",)}
    assert "DeepSpeed" in cases[-1].against
