"""Processes of a training loop beside the ranks: a data loader's workers start after kernels and threads are there."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from onebit.comm import Backend
from onebit.compress import SignCodec
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits
from tests.optim.loops import KINDS, STEPS, assert_equal_on_ranks, backward, batch, make, network, one_thread, settled

ROWS = 8
LIMIT = 40.0  # seconds that a worker may take for a batch; one that hangs takes any time


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """A rank's batches, made by kernels that the parent has loaded and run in its own threads."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        x, y = batch(self.rank, number, ROWS)
        return SignCodec().decode(SignCodec().encode(x), torch.empty_like(x)), y


@one_thread()
def train(backend: Backend, kind: str, start: str | None) -> list[bytes]:
    """Train an epoch and a half with new workers for each epoch, or none; returns the parameters."""
    SignCodec().encode(torch.ones(8))  # kernels and threads are there before the first worker is
    model = network()
    optimizer = make(kind, model.parameters(), backend)
    loader = DataLoader(
        Batches(backend.rank),
        batch_size=None,
        num_workers=1 if start else 0,
        multiprocessing_context=multiprocessing.get_context(start) if start else None,
        timeout=LIMIT if start else 0,
    )
    for epoch in range(2):
        for number, (x, y) in enumerate(loader):
            if epoch and number > STEPS // 2:
                break  # workers are ended in the middle, with batches under way
            optimizer.zero_grad()
            backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
    settled(optimizer)
    assert_equal_on_ranks(backend, list(model.parameters()))
    return bits(list(model.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_workers_forked_between_the_steps_of_gloo_ranks_neither_hang_nor_change_a_bit(kind: str) -> None:
    forked = run_ranks("gloo", 2, train, kind, "fork", timeout=100.0)
    assert forked == run_ranks("threads", 2, train, kind, None)
