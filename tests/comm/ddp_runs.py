"""Training runs with and without `DistributedDataParallel`, step for step on the same data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from onebit.comm import Backend
from onebit.comm.ddp import attach
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.comm.samples import bits

STEPS = 14

# Every kind of step that an optimizer makes comes within STEPS.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "OnebitAdam": (OnebitAdam, {"freeze_step": 4, "variance_refresh": 3}),
    "ZeroOneAdam": (
        ZeroOneAdam,
        {"var_freeze_step": 7, "var_update_scaler": 2, "local_step_scaler": 2, "local_step_clipper": 4},
    ),
    "OnebitLamb": (OnebitLamb, {"freeze_step": 4}),
}

WRAPS: dict[str, dict[str, Any]] = {
    "one bucket": {},
    "many buckets": {"bucket_cap_mb": 0.01},
    "views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.01},
    "static graph": {"static_graph": True, "bucket_cap_mb": 0.01},
}


class Straight(nn.Module):
    """Layers of which every one is used, with a parameter that is no whole block and one channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.hidden = nn.Linear(5 * 6 * 6, 67)
        self.out = nn.Linear(67, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.to(self.conv.weight.dtype)).relu().flatten(1)
        return self.out(self.hidden(x).relu()).float().square()


class Branching(Straight):
    """Two branches of which this rank takes one, and a layer that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.idle = nn.Linear(3, 3)
        self.branch = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.branches[self.branch](super().forward(x))
        return out


def model(kind: type[Straight] = Straight, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Straight:
    """The same on every rank."""
    torch.manual_seed(5)
    return kind().to(device, dtype)


def data(rank: int, step: int, rows: int = 4, device: Any = "cpu") -> Tensor:
    """What this rank sees in a step: (rows, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(rows, 3, 8, 8, generator=generator).to(device)


def backward(loss_of: nn.Module, x: Tensor) -> None:
    loss_of(x).mean().backward()


@dataclasses.dataclass
class Seen:
    """One rank's run: after every step the bits of the parameters, and what the step was."""

    params: list[list[bytes]]
    phases: list[str]
    averaged: list[bool]
    skipped: int
    collectives: int
    sent_by_hook: int
    sent: int


def run(
    backend: Backend,
    optimizer: str,
    wrap: Mapping[str, Any] | None,
    *,
    kind: type[Straight] = Straight,
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
    each: Callable[[nn.Module, Any, Tensor, int], None] | None = None,
    steps: int = STEPS,
    device: Any = "cpu",
) -> Seen:
    """Train on this rank.

    Args:
        wrap: options of DistributedDataParallel; None: the model is not wrapped.
        each: called with the model, the optimizer, this rank's data and the step's number, makes one whole step.
    """
    inner = model(kind, dtype, device)
    called: nn.Module = inner if wrap is None else DistributedDataParallel(inner, **wrap)
    make, defaults = OPTIMIZERS[optimizer]
    made = make(inner.parameters(), lr=1e-2, **{**defaults, **(options or {})})
    if wrap is not None:
        attach(called, made)
    seen = Seen([], [], [], 0, 0, 0, 0)
    for number in range(steps):
        if isinstance(inner, Branching):
            inner.branch = (number + backend.rank) // 2 % 2
        seen.phases.append(made.phase())
        with noting(made, seen.averaged):
            (each or step)(called, made, data(backend.rank, number, device=device), number)
        seen.params.append(bits(list(inner.parameters())))
    seen.skipped = made.skipped_steps
    seen.sent = made.stats.wire_bytes
    seen.sent_by_hook = 0 if made.averager is None else made.averager.stats.wire_bytes
    seen.collectives = made.stats.collectives
    return seen


def step(called: nn.Module, optimizer: Any, x: Tensor, number: int) -> None:
    """One training step as everybody writes it."""
    optimizer.zero_grad()
    backward(called, x)
    optimizer.step()


@contextlib.contextmanager
def noting(optimizer: Any, averaged: list[bool]) -> Iterator[None]:
    """Note for the last step within whether its gradients were averaged before it."""
    found: list[bool] = []
    handle = optimizer.register_step_pre_hook(lambda made, args, kwargs: found.append(made.gradients_averaged))
    yield
    handle.remove()
    averaged.append(found[-1])


def accumulated(called: nn.Module, optimizer: Any, x: Tensor, number: int) -> None:
    """A step of four micro-batches, of which DDP is told; the first is whole, as a static graph asks for."""
    optimizer.zero_grad()
    *first, last = x.split(1) if number else [x]
    with called.no_sync() if isinstance(called, DistributedDataParallel) else contextlib.nullcontext():
        for part in first:
            backward(called, part)
    backward(called, last)
    optimizer.step()


def scaled(device: str) -> Callable[[nn.Module, Any, Tensor, int], None]:
    """Steps by a GradScaler of which some overflow on one rank, so that ranks come to have different scales."""
    scaler = GradScaler(device, init_scale=2.0**8, growth_interval=3)

    def step_of(called: nn.Module, optimizer: Any, x: Tensor, number: int) -> None:
        optimizer.zero_grad()
        loss = called(x).mean()
        if number in (1, 6, 7) and dist.get_rank() == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        if number % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return step_of


def all_runs(backend: Backend, optimizer: str, device: str = "cpu") -> dict[str, tuple[Seen, Seen]]:
    """Runs of the wrapped model and of the unwrapped one; in one launch, as starting processes takes longer."""
    made = functools.partial(run, backend, optimizer, device=device)
    alone = made(None)
    runs = {name: (made(wrap), alone) for name, wrap in WRAPS.items()}
    collected = made(None, each=accumulated)
    for name in ("one bucket", "views", "static graph"):
        runs[f"accumulated, {name}"] = (made(WRAPS[name], each=accumulated), collected)
    branching = made(None, kind=Branching)
    for name in ("one bucket", "views"):
        wrap = {**WRAPS[name], "find_unused_parameters": True}
        runs[f"unused parameters, {name}"] = (made(wrap, kind=Branching), branching)
    runs["GradScaler"] = (made({}, each=scaled(device)), made(None, each=scaled(device)))
    return runs
