"""A small network, its data and the three compressed optimizers, for tests of what people write in training loops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onebit.comm import Backend
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam
from onebit.optim.base import CompressedOptimizer
from tests.comm.samples import bits
from tests.optim.samples import values

WARM_UP = 4

# Short schedules, so that a dozen steps see every phase.
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "OnebitAdam": (OnebitAdam, {"freeze_step": WARM_UP, "variance_refresh": 5}),
    "OnebitLamb": (OnebitLamb, {"freeze_step": WARM_UP}),
    "ZeroOneAdam": (
        ZeroOneAdam,
        {"var_freeze_step": WARM_UP, "var_update_scaler": 2, "local_step_scaler": 3, "local_step_clipper": 2},
    ),
}
STEPS = 14


def make(kind: str, params: Any, backend: object, **options: Any) -> Any:
    """One of the optimizers, with its short schedule."""
    cls, schedule = KINDS[kind]
    return cls(params, backend=backend, **{"lr": 1e-2, **schedule, **options})


def network(wide: int = 40) -> nn.Sequential:
    """Two layers and a normalisation between them, with values that every rank can work out."""
    model = nn.Sequential(nn.Linear(12, wide), nn.LayerNorm(wide), nn.GELU(), nn.Linear(wide, 3))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(values(3, i, shape=tuple(p.shape)) / max(p.shape[-1], 4) ** 0.5)
    return model


def batch(rank: int, number: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    """One rank's inputs of one step, and what a fixed map makes of them."""
    x = values(5, rank, number, shape=(rows, 12))
    return x, torch.tanh(x @ values(6, shape=(12, 3)))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: the last bit of a product depends on how many share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loss_of(model: Callable[[Tensor], Tensor], rank: int, number: int, rows: int = 16) -> Tensor:
    """The squared error of one rank's batch."""
    x, y = batch(rank, number, rows)
    return nn.functional.mse_loss(model(x).float(), y)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def test_error(model: nn.Module) -> float:
    """The squared error on data that no rank is trained on, without autocast."""
    with torch.no_grad():
        return float(loss_of(model, 1000, 0, rows=512))


test_error.__test__ = False  # type: ignore[attr-defined]


def settled(optimizer: CompressedOptimizer) -> None:
    """Make the ranks' parameters equal, where the optimizer lets them differ between its meetings."""
    if isinstance(optimizer, ZeroOneAdam):
        optimizer.synchronize()


def assert_equal_on_ranks(backend: Backend, tensors: Sequence[Tensor]) -> None:
    """Every rank's tensors have rank 0's bits."""
    for index, tensor in enumerate(tensors):
        mine = tensor.detach().float().reshape(-1).contiguous()
        theirs = mine.new_empty(backend.size * mine.numel())
        if mine.numel():
            backend.all_gather(theirs, mine).wait()
            assert bits(theirs[: mine.numel()]) == bits(mine), f"tensor {index} of rank {backend.rank} is not rank 0's"
