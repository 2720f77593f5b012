"""OnebitAdam of n ranks in float64 NumPy: written from the papers' formulas, not from the code.

Warm-up is Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019) on the mean gradient. After it (Tang et al. 2021,
arXiv 2102.02888), with T = freeze_step:

    m_i = β₁·m + (1 - β₁)·g_i       m = C(mean of m_i)       x <- x - lr·λ·x - lr·m/(1 - β₁ᵗ) / (√(v_T/(1 - β₂ᵀ)) + ε)

An entry with v_T = 0 is dead: it takes no part in C and is not moved by m. What had no gradient in warm-up never moves.

With ``freeze_step="auto"``, T is the first step t of which all of this is true, where Δ = 1/(1 - β₂) is rounded to a
multiple of what lies between measurements, w(t) = ‖v_t/(1 - β₂ᵗ)‖₁ and the measurement is of the step before:

    t - 1 is a multiple of max(Δ // 16, 1)     0.96 <= w(t-1)/w(t-1-Δ) <= 1/0.96     lr did not rise in t-Δ .. t

After a dense step that a compressed one follows, √v of an entry that is not dead is raised to a tenth of the mean √v of
those of its block.

With ``variance_refresh=k`` steps T+k, T+2k, ... take the mean gradient for m and v <- β₂ᵏ·v + (1 - β₂ᵏ)·g².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.comm.oracle import UNIT, CompressedMean, Floats

Gradients = Sequence[Floats | None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one parameter group, as OnebitAdam names them."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    freeze_step: int | str = 10
    variance_refresh: int = 0
    variance_floor: float = 0.1
    compress: bool = True
    adamw_mode: bool = True
    bias_correction: bool = True
    maximize: bool = False


def slack(steps: int, largest: float) -> float:
    """How far momentum and feedback may be off after some steps.

    A step rounds fewer than 40 times (see tests/comm/oracle.py), numbers of at most `largest`. It does not
    enlarge the error it starts with: new residual = c - s·sign(c), with s the mean of |c|, is a projection. So errors
    add up like the steps of a random walk, by the root of their number.
    """
    return math.sqrt(40 * steps) * UNIT * largest


def put_floor(variances: Sequence[Floats], fraction: float, block_size: int | None) -> None:
    """√v of an entry that is not 0 becomes at least `fraction` of the mean √v of those of its block, in place."""
    size = block_size or 1024
    for v in variances:
        flat = v.reshape(-1)
        for start in range(0, flat.size, size):
            block = flat[start : start + size]
            live = block > 0
            if live.any():
                block[live] = np.maximum(block[live], (fraction * np.sqrt(block[live]).mean()) ** 2)


class OnebitAdam:
    """All ranks of one parameter group.

    Attributes:
        x, m, v: parameters, momentum and variance, the same on every rank.
        steps: how many updates each parameter has had.
        mean: the compressed average with its error feedback, once there is one.
        frozen_at: the last step of warm-up, once known.
        ratios: step and w(t-1)/w(t-1-Δ) of every measurement that had one to be compared with.
    """

    def __init__(
        self, x: Sequence[Floats], world_size: int, options: Options, block_size: int | None = 1024, scale: str = "mean"
    ) -> None:
        self.x = [np.array(p, np.float64) for p in x]
        self.m = [np.zeros_like(p) for p in self.x]
        self.v = [np.zeros_like(p) for p in self.x]
        self.steps = [0] * len(self.x)
        self.options = options
        self.mean: CompressedMean | None = None
        self.frozen_at = options.freeze_step if isinstance(options.freeze_step, int) else None
        self.ratios: list[tuple[int, float]] = []
        self._step = 0
        self._age = [0] * len(self.x)  # how many steps each variance stands for
        self._norms = {0: 0.0}
        self._rates = [0.0]
        self._codec = (block_size, scale)
        self._world_size = world_size

    def step(self, ranks: Sequence[Gradients], lr: float | None = None) -> None:
        """One step with every rank's own gradients."""
        self._step += 1
        lr = self.options.lr if lr is None else lr
        self._rates.append(lr)
        after = self._step - self.frozen_at if self.frozen_at is not None and self.options.compress else 0
        if after <= 0:
            self._warm_up(ranks, lr)
            self._norms[self._step] = self._norm()
            if self.options.freeze_step == "auto" and self.options.compress and self._stable():
                self.frozen_at = self._step
            if self._step == self.frozen_at and self.options.compress:
                self._raise()
        elif self.options.variance_refresh and after % self.options.variance_refresh == 0:
            self._refresh(ranks, lr)
            self._raise()
        else:
            self._compressed(ranks, lr)

    def _norm(self) -> float:
        beta2 = self.options.betas[1]
        return sum(float(np.abs(v).sum()) / (1 - beta2**age) for v, age in zip(self.v, self._age, strict=True) if age)

    def _stable(self) -> bool:
        delta = round(1 / (1 - self.options.betas[1]))
        every = max(delta // 16, 1)
        delta = delta // every * every
        now, then = self._step - 1, self._step - 1 - delta
        if now % every or then <= 0:
            return False
        self.ratios.append((self._step, self._norms[now] / self._norms[then]))
        rose = max((t for t in range(1, self._step + 1) if self._rates[t] > self._rates[t - 1]), default=0)
        return 0.96 <= self.ratios[-1][1] <= 1 / 0.96 and rose <= then

    def _warm_up(self, ranks: Sequence[Gradients], lr: float) -> None:
        o = self.options
        for i in range(len(self.x)):
            given = [g[i] for g in ranks if g[i] is not None]
            if given:
                mean = np.sum(np.stack(given), axis=0) / len(ranks)
                g = self._wanted(mean, i)
                self.m[i] = o.betas[0] * self.m[i] + (1 - o.betas[0]) * g
                self.v[i] = o.betas[1] * self.v[i] + (1 - o.betas[1]) * g * g
                self.steps[i] += 1
                self._age[i] += 1
                self._move(i, lr)

    def _compressed(self, ranks: Sequence[Gradients], lr: float) -> None:
        o = self.options
        used = [i for i in range(len(self.x)) if self.steps[i]]
        if self.mean is None:
            dead = [self.v[i] == 0 for i in used]
            self.mean = CompressedMean(self._world_size, [self.x[i].size for i in used], *self._codec, masks=dead)
        local = [
            [o.betas[0] * self.m[i] + (1 - o.betas[0]) * self._wanted(0.0 if g[i] is None else g[i], i) for i in used]
            for g in ranks
        ]
        for i, mean in zip(used, self.mean(local), strict=True):
            self.m[i] = mean.reshape(self.x[i].shape)
            self.steps[i] += 1
            self._move(i, lr)

    def _refresh(self, ranks: Sequence[Gradients], lr: float) -> None:
        o = self.options
        used = [i for i in range(len(self.x)) if self.steps[i]]
        kept = o.betas[1] ** o.variance_refresh
        for i in used:
            given = [g[i] for g in ranks if g[i] is not None]
            g = self._wanted(np.sum(np.stack(given), axis=0) / len(ranks) if given else 0.0, i)
            self.m[i] = o.betas[0] * self.m[i] + (1 - o.betas[0]) * g
            if given:
                self.v[i] = kept * self.v[i] + (1 - kept) * g * g
                self._age[i] += o.variance_refresh
            self.steps[i] += 1
            self._move(i, lr)
        if self.mean is not None:
            self.mean.masks = [self.v[i].reshape(-1) == 0 for i in used]

    def _raise(self) -> None:
        if self._world_size > 1 and self.options.variance_refresh != 1:
            put_floor(self.v, self.options.variance_floor, self._codec[0])

    def _wanted(self, gradient: Floats | float, i: int) -> Floats:
        """The gradient of what is to become smaller."""
        signed = -gradient if self.options.maximize else gradient
        return signed + (0.0 if self.options.adamw_mode else self.options.weight_decay) * self.x[i]

    def _move(self, i: int, lr: float) -> None:
        o = self.options
        m, v = self.m[i], self.v[i]
        if o.bias_correction:
            m, v = m / (1 - o.betas[0] ** self.steps[i]), v / (1 - o.betas[1] ** self._age[i])
        decay = lr * o.weight_decay * self.x[i] if o.adamw_mode else 0.0
        self.x[i] = self.x[i] - decay - lr * m / (np.sqrt(v) + o.eps)
