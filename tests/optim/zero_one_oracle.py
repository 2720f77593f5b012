"""ZeroOneAdam of n ranks in float64 NumPy: written from the paper's formulas, not from the code.

Lu et al. 2022 (0/1 Adam, arXiv 2202.06009), Algorithm 1, with T_v the variance steps and T_u ⊇ T_v the synchronised
ones. Every rank has its own x, m and u, and y is what x was when the ranks last met. With t counted from 1 and k the
number of variance steps up to t:

    γ = lr / (1 - β₁ᵗ)       D = √(v / (1 - β₂ᵏ)) + ε       κ = the product of 1 - lr·λ since the ranks last met
    m <- β₁·m + (1 - β₁)·g       u <- u + γ·m       x <- κ·y - u/D
    t ∈ T_v:           g is the mean over ranks, and v <- β₂·v + (1 - β₂)·g² before it is used
    t ∈ T_u, ∉ T_v:    m <- C(mean of u / Σγ),  x <- κ·y - Σγ·m/D,  u <- 0

Different from the paper: C gets u / Σγ rather than u, so that error feedback is in units of momentum; where Σγ is 0 it
gets m. An entry with v = 0 is dead until a variance step brings it to life: it takes no part in C and has no m and u.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tests.comm.oracle import Bools, CompressedMean, Floats
from tests.optim.oracle import put_floor

Gradients = Sequence[Floats | None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one parameter group, as ZeroOneAdam names them."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    var_freeze_step: int = 100
    var_update_scaler: int = 16
    local_step_scaler: int = 32678
    local_step_clipper: int = 16
    variance_floor: float = 0.1
    adamw_mode: bool = True
    bias_correction: bool = True
    maximize: bool = False


class ZeroOneAdam:
    """All ranks of one parameter group.

    Attributes:
        x, m, u: per rank and parameter.
        y, v: per parameter.
        steps, variance_steps: updates of each parameter, and of its variance.
        kinds: of every step made, "variance", "sync" or "local".
        mean: the compressed average with its error feedback, once there is one.
    """

    def __init__(
        self, x: Sequence[Floats], world_size: int, options: Options, block_size: int | None = 1024, scale: str = "mean"
    ) -> None:
        self.x = [[np.array(p, np.float64) for p in x] for _ in range(world_size)]
        self.m = [[np.zeros_like(p) for p in self.x[0]] for _ in range(world_size)]
        self.u = [[np.zeros_like(p) for p in self.x[0]] for _ in range(world_size)]
        self.y = [p.copy() for p in self.x[0]]
        self.v = [np.zeros_like(p) for p in self.x[0]]
        self.steps = [0] * len(x)
        self.variance_steps = [0] * len(x)
        self.kinds: list[str] = []
        self.options = options
        self.mean: CompressedMean | None = None
        self._codec = (block_size, scale)
        self._ranks = range(world_size)
        self._weight = [0.0] * len(x)
        self._kept = [1.0] * len(x)
        self._variance_at = variance_steps(options)
        self._sync_at = sync_steps(options)
        self._next_variance = next(self._variance_at)
        self._next_sync = next(self._sync_at)

    def step(self, ranks: Sequence[Gradients | None], lr: float | None = None) -> None:
        """One step with every rank's own gradients; a rank that leaves out a local step gives None for itself."""
        number = len(self.kinds) + 1
        lr = self.options.lr if lr is None else lr
        kind = "local"
        if number == self._next_sync:
            kind, self._next_sync = "sync", next(self._sync_at)
        if number == self._next_variance:
            kind, self._next_variance = "variance", next(self._variance_at, 0)
        if kind == "variance":
            self._update_variance(ranks, lr)
        else:
            self._use_variance(ranks, lr, kind)
        self.kinds.append(kind)

    def _update_variance(self, ranks: Sequence[Gradients | None], lr: float) -> None:
        o = self.options
        for i in range(len(self.y)):
            given = [g[i] for g in ranks if g is not None and g[i] is not None]
            if given:
                g = self._wanted(np.sum(np.stack(given), axis=0) / len(ranks), self.y[i])
                self.v[i] = o.betas[1] * self.v[i] + (1 - o.betas[1]) * g * g
                self.variance_steps[i] += 1
                self._open(i, lr)
                for r in self._ranks:
                    self.m[r][i] = o.betas[0] * self.m[r][i] + (1 - o.betas[0]) * g
                self._meet(i, self.m[0][i])
        if len(ranks) > 1 and self._next_variance != len(self.kinds) + 2:
            put_floor(self.v, o.variance_floor, self._codec[0])
        if self.mean is not None:
            self.mean.masks = [self.v[i].reshape(-1) == 0 for i in self._used()]
            assert len(self.mean.masks) == len(self.mean.numels), "a parameter came to life after the first sync"

    def _use_variance(self, ranks: Sequence[Gradients | None], lr: float, kind: str) -> None:
        o, used = self.options, self._used()
        for i in used:
            self._open(i, lr)
            dead: Bools = self.v[i] == 0
            for r in self._ranks:
                mine = ranks[r]
                if mine is not None:
                    given = mine[i]
                    g = self._wanted(np.zeros_like(self.y[i]) if given is None else given, self.x[r][i])
                    self.m[r][i] = np.where(dead, 0.0, o.betas[0] * self.m[r][i] + (1 - o.betas[0]) * g)
                    self.u[r][i] = self.u[r][i] + self._rate(i, lr) * self.m[r][i]
                self.x[r][i] = self._kept[i] * self.y[i] - self.u[r][i] / self._spread(i)
        if len(self._ranks) == 1:
            for i in used:  # to meet oneself changes nothing
                self._restart(i)
        elif kind == "sync":
            if self.mean is None:
                masks = [self.v[i] == 0 for i in used]
                self.mean = CompressedMean(len(self._ranks), [self.y[i].size for i in used], *self._codec, masks=masks)
            said = [
                [self.u[r][i] / self._weight[i] if self._weight[i] else self.m[r][i] for i in used] for r in self._ranks
            ]
            for i, mean in zip(used, self.mean(said), strict=True):
                self._meet(i, mean.reshape(self.y[i].shape))

    def _open(self, i: int, lr: float) -> None:
        """Count a step of a parameter."""
        o = self.options
        self.steps[i] += 1
        self._weight[i] += self._rate(i, lr)
        self._kept[i] *= 1 - lr * o.weight_decay if o.adamw_mode else 1.0

    def _meet(self, i: int, m: Floats) -> None:
        """All ranks make the steps since they last met with one momentum."""
        for r in self._ranks:
            self.m[r][i] = m
            self.x[r][i] = self._kept[i] * self.y[i] - self._weight[i] * m / self._spread(i)
        self._restart(i)

    def _restart(self, i: int) -> None:
        self.y[i] = self.x[0][i]
        for r in self._ranks:
            self.u[r][i] = np.zeros_like(self.y[i])
        self._weight[i], self._kept[i] = 0.0, 1.0

    def _used(self) -> list[int]:
        return [i for i in range(len(self.y)) if self.steps[i]]

    def _rate(self, i: int, lr: float) -> float:
        o = self.options
        return lr / (1 - o.betas[0] ** self.steps[i]) if o.bias_correction else lr

    def _spread(self, i: int) -> Floats:
        o = self.options
        v = self.v[i] / (1 - o.betas[1] ** self.variance_steps[i]) if o.bias_correction else self.v[i]
        return np.asarray(np.sqrt(v) + o.eps)

    def _wanted(self, gradient: Floats, x: Floats) -> Floats:
        """The gradient of what is to become smaller."""
        signed = -gradient if self.options.maximize else gradient
        return np.asarray(signed + (0.0 if self.options.adamw_mode else self.options.weight_decay) * x)


def variance_steps(options: Options) -> Iterator[int]:
    """T_v: gaps of 2^⌊j/κ⌋ until the freeze."""
    at = 1
    for j in itertools.count():
        if at > options.var_freeze_step:
            return
        yield at
        at += 2 ** (j // options.var_update_scaler)


def sync_steps(options: Options) -> Iterator[int]:
    """T_u: every step until the freeze, then gaps that double every local_step_scaler steps, up to the clipper."""
    yield from range(1, options.var_freeze_step + 1)
    past = 0
    while True:
        past += min(2 ** (past // options.local_step_scaler), options.local_step_clipper)
        yield options.var_freeze_step + past
