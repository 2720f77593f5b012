"""A network trained with exchanges during backward or without, and what there was to see after every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from onebit.comm import Backend
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.optim.samples import checksum, contents, feedback, through_a_file, values

OPTIMIZERS: dict[str, Callable[..., Any]] = {"adam": OnebitAdam, "zero_one": ZeroOneAdam, "lamb": OnebitLamb}
WIDTH = 40
LAYERS = 5
SMALL = 0.0125  # MiB: two of the matrices


class Network(nn.Module):
    """Layers one after the other; a side branch that some ranks leave out at times, and one that nobody uses."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        shapes = [(WIDTH, WIDTH), (WIDTH,)] * LAYERS
        self.layers = nn.ParameterList(values(3, i, shape=s).div(4).to(dtype) for i, s in enumerate(shapes))
        self.side = Parameter(values(4, shape=(WIDTH, WIDTH)).t().div(4).to(dtype))  # not row-major
        self.scale = Parameter(torch.ones((), dtype=dtype))
        self.unused = Parameter(torch.ones(3, dtype=dtype))
        self.empty = Parameter(torch.ones(0, dtype=dtype))

    def forward(self, x: Tensor, side: bool) -> Tensor:
        if side:
            x = x + torch.tanh(x @ self.side)
        for weight, bias in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = torch.tanh(x @ weight + bias)
        return (x * self.scale).square().sum() + self.empty.sum()

    def groups(self) -> list[dict[str, Any]]:
        """Three groups whose members are ready at different times; one is never compressed."""
        return [
            {"params": [self.side, *self.layers[::2]]},
            {"params": self.layers[1::2], "weight_decay": 0.0},
            {"params": [self.unused, self.scale, self.empty], "compress": False},
        ]


def batch(rank: int, number: int, bad: bool = False) -> Tensor:
    """One rank's input."""
    x = values(5, rank, number, shape=(4, WIDTH))
    return x.fill_(math.inf) if bad else x


def backward(network: Network, rank: int, number: int, bad: bool = False) -> None:
    """Of one batch; whether the side branch is used depends on the rank."""
    x = batch(rank, number, bad).to(network.scale)
    loss = network(x, side=(rank + number) % 3 != 0)
    loss.backward()


@dataclass(frozen=True)
class Seen:
    """What one rank had after a step: checksums, and counts."""

    state: str
    feedback: str
    skipped: int
    phases: tuple[str, ...]
    wire_bytes: int
    overlapped: tuple[int, int]


def look(optimizer: Any) -> Seen:
    return Seen(
        state=checksum(contents(optimizer)),
        feedback=checksum(feedback(optimizer)),
        skipped=optimizer.skipped_steps,
        phases=tuple(optimizer.phase(g) for g in range(len(optimizer.param_groups))),
        wire_bytes=optimizer.stats.wire_bytes,
        overlapped=optimizer.overlapped,
    )


def make(name: str, network: Network, backend: Backend, overlap: bool, **options: Any) -> Any:
    start = {"lr": 1e-2, "backend": backend, "bucket_mb": SMALL, "overlap": overlap, **options}
    return OPTIMIZERS[name](network.groups(), **start)


def train(
    backend: Backend,
    name: str,
    overlap: bool,
    options: Mapping[str, Any],
    *,
    steps: int = 9,
    micro_batches: int = 1,
    bad: tuple[int, ...] = (),
    reload_at: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Seen]:
    """Train on one rank; returns what was seen after each step.

    Args:
        micro_batches: backward passes per step, all but the last in `no_sync`.
        bad: steps in which the last rank's input is infinite.
        reload_at: the step before which the optimizer is replaced by one that loads its state from a file.
    """
    network = Network(dtype).to(device)
    optimizer = make(name, network, backend, overlap, **options)
    seen = []
    for number in range(steps):
        if number == reload_at:
            saved = through_a_file(optimizer.state_dict())
            optimizer = make(name, network, backend, overlap, **options)
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        with optimizer.no_sync():
            for part in range(1, micro_batches):
                backward(network, backend.rank, 100 * part + number)
        backward(network, backend.rank, number, number in bad and backend.rank == backend.size - 1)
        optimizer.step()
        seen.append(look(optimizer))
    return seen
