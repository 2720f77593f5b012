"""The training that faults strike: small, with every phase of every optimizer, and the same on every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import CompressedOptimizer, OnebitAdam, OnebitLamb, ZeroOneAdam, checkpoint
from tests.comm.oracle import UNIT
from tests.comm.samples import bits
from tests.optim.samples import values

SHAPES = ((96, 64), (96,), (0,), (64, 96), ())
STEPS = 18
BUCKET_MB = 0.02  # several buckets, so that a fault finds some of them done and others on their way

# All phases come within ten steps; an interval of 0/1 Adam is at most four steps long.
MAKERS: dict[str, Any] = {
    "OnebitAdam": lambda params, **options: OnebitAdam(params, freeze_step=3, variance_refresh=5, **options),
    "OnebitLamb": lambda params, **options: OnebitLamb(params, freeze_step=3, **options),
    "ZeroOneAdam": lambda params, **options: ZeroOneAdam(
        params, var_freeze_step=4, var_update_scaler=1, local_step_scaler=2, local_step_clipper=4, **options
    ),
}


@dataclass(frozen=True)
class Moment:
    """What one rank has after a number of steps.

    Attributes:
        contents: copies of parameters, moments and counts, by what they are.
        feedback: error feedback, in one vector.
    """

    contents: Mapping[str, Tensor]
    feedback: Tensor

    @staticmethod
    def of(optimizer: CompressedOptimizer) -> Moment:
        saved = optimizer.state_dict()
        found = {f"step of group {i}": torch.tensor(group["step"]) for i, group in enumerate(saved["param_groups"])}
        for i, p in enumerate(_params(optimizer)):
            found[f"parameter {i}"] = p.detach()
            state = saved["state"].get(i, {})
            found |= {f"{key} of parameter {i}": torch.as_tensor(value) for key, value in state.items()}
        return Moment({name: value.clone() for name, value in found.items()}, feedback(saved))

    def misfits(self, expected: Moment) -> list[str]:
        """What is not as expected; feedback that was put back is, to within rounding.

        Putting back takes fewer than 8 + 4n roundings of momenta and feedback, all of which are less than 10; what
        failed twice was put back twice. Before the first compressed step there is no feedback, which is feedback of 0.
        """
        theirs = expected.feedback if expected.feedback.numel() else torch.zeros_like(self.feedback)
        return self._differences(expected) + _difference("feedback", self.feedback, theirs, 2 * 24 * UNIT * 10)

    def fits(self, expected: Moment) -> bool:
        """Whether `misfits` finds nothing."""
        return not self.misfits(expected)

    def equals(self, expected: Moment) -> bool:
        """Whether all is as expected to the last bit."""
        return not self._differences(expected) + _difference("feedback", self.feedback, expected.feedback)

    def _differences(self, expected: Moment) -> list[str]:
        names = dict.fromkeys([*self.contents, *expected.contents])
        pairs = [(name, self.contents.get(name), expected.contents.get(name)) for name in names]
        return [said for pair in pairs for said in _difference(*pair)]


def _difference(name: str, ours: Tensor | None, theirs: Tensor | None, bound: float | None = None) -> list[str]:
    """At most one line about two tensors that are not equal bit by bit, or not within a bound."""
    if ours is None or theirs is None:
        return [f"{name}: {'missing' if ours is None else 'not expected'}"]
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return [f"{name}: {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(theirs.shape)}"]
    ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    if bits(ours) == bits(theirs):
        return []
    off = (ours.double() - theirs.double()).abs()
    if bound is not None and bool((off <= bound).all()):
        return []
    where = (~(off <= (bound or 0.0))).nonzero().view(-1).tolist()
    return [f"{name}: {len(where)} of {len(off)} elements, from {where[:1]} to {where[-1:]}, by up to {off.max():.3g}"]


def feedback(saved: dict[str, Any]) -> Tensor:
    """All error feedback in a saved state, in one vector."""
    parts = [residual[side] for residual in saved["onebit"]["residuals"] for side in ("worker", "server")
             if side in residual]  # fmt: skip
    return torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0)


def make(name: str, backend: Backend, **options: Any) -> CompressedOptimizer:
    params = [Parameter(values(i, shape=shape)) for i, shape in enumerate(SHAPES)]
    split = len(params) // 2
    groups = [{"params": params[:split]}, {"params": params[split:], "lr": 3e-3}]
    options = {"bucket_mb": BUCKET_MB, **options}
    optimizer: CompressedOptimizer = MAKERS[name](groups, lr=1e-2, backend=backend, **options)
    return optimizer


def give_gradients(optimizer: CompressedOptimizer, rank: int, number: int) -> None:
    """This rank's own gradients of one step; some are None."""
    for i, p in enumerate(_params(optimizer)):
        absent = (i + number + rank) % 5 == 0
        p.grad = None if absent else values(i, number % 6, rank, shape=tuple(p.shape)) * (1 + number / 8)


def undisturbed(name: str, world_size: int, steps: int = STEPS) -> list[list[Moment]]:
    """What every rank has after each of 0 to `steps` steps in which nothing goes wrong, by threads."""

    def train(backend: Backend) -> list[Moment]:
        optimizer = make(name, backend)
        seen = [Moment.of(optimizer)]
        for number in range(steps):
            give_gradients(optimizer, backend.rank, number)
            optimizer.step()
            seen.append(Moment.of(optimizer))
        return seen

    return run_threads(world_size, train)


def save(optimizer: CompressedOptimizer, folder: Path) -> Path:
    """Write this rank's checkpoint as a user does."""
    return checkpoint.save(folder, optimizer, params=[p.detach() for p in _params(optimizer)])


def load(name: str, backend: Backend, path: Path) -> CompressedOptimizer:
    """A new optimizer that goes on from one rank's file, without a word to the others."""
    saved = torch.load(path, weights_only=True)
    optimizer = make(name, backend)
    with torch.no_grad():
        for p, value in zip(_params(optimizer), saved["extra"]["params"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return optimizer


def _params(optimizer: CompressedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
