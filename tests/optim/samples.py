"""Parameters that start alike on every rank, gradients that do not, and an optimizer's state bit by bit."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend
from onebit.optim import CompressedOptimizer, OnebitAdam
from tests.comm.samples import bits, state_bits, strided

Gradients = list[Tensor | None]

# Shape and strides: a matrix, one number, nothing, a prime, one element, two images and a transposed matrix.
SHAPES: tuple[tuple[tuple[int, ...], str], ...] = (
    ((5, 7), "rows"),
    ((), "rows"),
    ((0,), "rows"),
    ((131,), "rows"),
    ((1,), "rows"),
    ((2, 3, 4, 5), "channels_last"),
    ((6, 9), "transposed"),
)


def values(*seed: int, shape: tuple[int, ...]) -> Tensor:
    """Normal fp32 numbers that every rank can work out."""
    return torch.as_tensor(np.random.default_rng([41, *seed]).standard_normal(shape), dtype=torch.float32)


def parameters(
    shapes: Sequence[tuple[tuple[int, ...], str]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[Parameter]:
    """The start of every rank."""
    return [Parameter(strided(values(i, shape=shape).to(dtype), s)) for i, (shape, s) in enumerate(shapes)]


def in_rows() -> list[Parameter]:
    """The same start with row-major strides, which not all of `parameters` have."""
    return [Parameter(p.detach().contiguous()) for p in parameters()]


def mixed(indices: Sequence[int] = range(len(SHAPES))) -> list[Parameter]:
    """Parameters of all shapes and dtypes, fp32, bf16 and fp16."""
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float16)
    return [Parameter(parameters()[i].detach().to(dtypes[i % 4])) for i in indices]


def gradients(params: Sequence[Tensor], rank: int, step: int) -> Gradients:
    """One rank's own gradients of one step: a part that all ranks share, and a larger one of its own."""
    made: Gradients = []
    for i, p in enumerate(params):
        shape = tuple(p.shape)
        g = 0.5 * values(7, i, step, shape=shape) + values(8, i, step, rank, shape=shape)
        made.append((g * 10.0 ** (i % 3 - 1)).to(p.dtype))
    return made


def strided_too(params: Sequence[Tensor], rank: int, step: int) -> Gradients:
    """The same gradients with the strides of their parameters."""
    return [torch.empty_like(p).copy_(g) for p, g in zip(params, gradients(params, rank, step), strict=True)]


def patchy(params: Sequence[Tensor], rank: int, step: int) -> Gradients:
    """Gradients of which some are None: on one rank, on all ranks for a step, and on all but one rank always."""
    made = gradients(params, rank, step)
    for i in range(len(made)):
        if (i + step + rank) % 4 == 0 or (i + step) % 5 == 0 or (i == 3 and rank != 0):
            made[i] = None
    return made


def mean_of(ranks: Sequence[Gradients]) -> Gradients:
    """The mean gradient in fp32, added in the order of the ranks; None where no rank has one."""
    means: Gradients = []
    for per_rank in zip(*ranks, strict=True):
        shape = next((g for g in per_rank if g is not None), None)
        if shape is None:
            means.append(None)
            continue
        total = torch.zeros_like(shape, dtype=torch.float32)
        for g in per_rank:
            total += 0.0 if g is None else g.float()
        means.append(total / len(ranks))
    return means


def rate(number: int) -> float:
    """A schedule: what an optimizer's learning rate is multiplied by at a step, counted from 0."""
    return 1.0 + 0.5 * math.sin(number)


def step(optimizer: torch.optim.Optimizer, given: Sequence[Tensor | None]) -> None:
    """Step with these gradients for the parameters of all groups in order."""
    for p, g in zip(all_params(optimizer), given, strict=True):
        p.grad = None if g is None else g.to(p.dtype).clone()
    optimizer.step()


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def contents(optimizer: torch.optim.Optimizer, params: Sequence[Tensor] | None = None) -> list[Any]:
    """Every parameter with its moments and step count as they would be saved, bit by bit."""
    listed = all_params(optimizer) if params is None else params
    saved, places = optimizer.state_dict()["state"], {p: i for i, p in enumerate(all_params(optimizer))}
    return [(bits(p), state_bits(dict(saved.get(places[p], {})))) for p in listed]


def checksum(content: Any) -> str:
    """The same for equal contents, in any process."""
    hashed = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            value = [item for pair in value.items() for item in pair]
        if isinstance(value, (list, tuple)):
            hashed.update(f"[{len(value)}".encode())
            for item in value:
                walk(item)
        else:
            hashed.update(value if isinstance(value, bytes) else repr(value).encode())

    walk(content)
    return hashed.hexdigest()


def feedback(optimizer: OnebitAdam) -> Any:
    """The error feedback of this rank, bit by bit."""
    return state_bits(optimizer.state_dict()["onebit"])


def through_a_file(state: Mapping[str, Any]) -> dict[str, Any]:
    """Saved, and loaded as an untrusted file is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


FREEZE_SOON: dict[str, Any] = {"freeze_step": 4, "lr": 1e-2}


def run(
    backend: Backend,
    steps: int,
    observe: Callable[[Any], Any],
    given: Callable[[Sequence[Tensor], int, int], Gradients],
    start: Callable[[], list[Parameter]],
    options: Mapping[str, Any],
    kind: Callable[..., CompressedOptimizer] = OnebitAdam,
) -> list[Any]:
    """Make steps on one rank; returns what was observed of the optimizer, one of such a kind, after each."""
    params = start()
    optimizer = kind(params, backend=backend, **options)
    seen = []
    for number in range(steps):
        step(optimizer, given(params, backend.rank, number))
        seen.append(observe(optimizer))
    return seen


# The weights and biases of a network of 101,386 parameters.
NETWORK: tuple[tuple[int, ...], ...] = ((256, 128), (256,), (256, 256), (256,), (10, 256), (10,))


@dataclass(frozen=True)
class Step:
    """What one rank had after a step: checksums, and bytes handed to the transport by it."""

    state: str
    feedback: str
    skipped: int
    phase: str
    wire_bytes: int
    dense_bytes: int


def train_network(backend: Backend, freeze_step: int = 3, steps: int = 8) -> list[Step]:
    """Train it, with gradients that depend on the parameters; some are missing, and one is bad once per phase."""
    params = [Parameter(values(i, shape=shape)) for i, shape in enumerate(NETWORK)]
    optimizer = OnebitAdam(params, lr=1e-2, freeze_step=freeze_step, backend=backend)
    seen = []
    for number in range(steps):
        given: Gradients = [
            p.detach() + values(i, number, backend.rank, shape=shape)
            for i, (p, shape) in enumerate(zip(params, NETWORK, strict=True))
        ]
        given[2 + (number + backend.rank) % 4] = None
        if number in (1, steps - 3) and backend.rank == backend.size - 1:
            given[number % 2].view(-1)[77] = math.inf
        before = (optimizer.stats.wire_bytes, optimizer.stats.dense_bytes)
        step(optimizer, given)
        stats = optimizer.stats
        seen.append(
            Step(
                state=checksum(contents(optimizer)),
                feedback=checksum(feedback(optimizer)),
                skipped=optimizer.skipped_steps,
                phase=optimizer.phase(),
                wire_bytes=stats.wire_bytes - before[0],
                dense_bytes=stats.dense_bytes - before[1],
            )
        )
    return seen
