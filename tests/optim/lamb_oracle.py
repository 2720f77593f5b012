"""OnebitLamb of n ranks in float64 NumPy: written from the papers' formulas, not from the code.

Warm-up is LAMB (You et al. 2020, arXiv 1904.00962) on the mean gradient, with m̂ = m/(1 - β₁ᵗ), v̂ = v/(1 - β₂ᵗ):

    u = m̂/(√v̂ + ε) + λ·x       c = clip(‖x‖/‖u‖, min_coeff, max_coeff), 1 where a norm is 0       x <- x - lr·c·u

After it (Li et al. 2021, arXiv 2104.06069), with T the last step of warm-up, c̄ the running mean of c until then, and
v′ the variance of gradients that are reconstructed from the averaged momentum, v′ = v_T at the start:

    m_i = β₁·m + (1 - β₁)·g_i       m′ = C(mean of m_i)       g′ = (m′ - β₁·m)/(1 - β₁)       m = m′
    u₀ = m̂/(√v̂_T + ε)       u = u₀ + λ·x       x <- x - lr·c̄·r·u  with the r of the step before, 1 at first
    v′ <- β₂·v′ + (1 - β₂)·g′²      r′ = max((√v̂_T + ε)/(√v̂′ + ε));  with λ > 0: a = min(1, ‖u₀‖/‖u‖),
    r′ <- r′·a + 1 - a       r <- clip(r′, factor_min, factor_max), then to the last r times 1 ± factor_threshold

With both bounds 1 there is no r and no v′. The paper uses the r of the step itself; here it is the next step's, where
onebit departs from it on purpose. An entry with v_T = 0 is dead: it takes no part in C nor in the maximum, and is not
moved by m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.comm.oracle import CompressedMean, Floats
from tests.optim.oracle import put_floor

Gradients = Sequence[Floats | None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one parameter group, as OnebitLamb names them."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 1e-2
    freeze_step: int = 10
    max_coeff: float = 10.0
    min_coeff: float = 0.01
    coeff_beta: float = 0.9
    factor_max: float = 1.0
    factor_min: float = 1.0
    factor_threshold: float = 0.1
    variance_floor: float = 0.1
    bias_correction: bool = True
    maximize: bool = False


class OnebitLamb:
    """All ranks of one parameter group.

    Attributes:
        x, m, v: parameters, momentum and variance, the same on every rank.
        fresh: v′, once there is one; none without a factor.
        coefficients: c in warm-up and c̄ after it, by parameter.
        factors: r of the next step, by parameter.
        steps: how many updates each parameter has had.
        mean: the compressed average with its error feedback, once there is one.
    """

    def __init__(
        self, x: Sequence[Floats], world_size: int, options: Options, block_size: int | None = 1024, scale: str = "mean"
    ) -> None:
        self.x = [np.array(p, np.float64) for p in x]
        self.m = [np.zeros_like(p) for p in self.x]
        self.v = [np.zeros_like(p) for p in self.x]
        self.fresh: list[Floats] = []
        self.coefficients = [1.0] * len(self.x)
        self.factors = [1.0] * len(self.x)
        self.steps = [0] * len(self.x)
        self.options = options
        self.mean: CompressedMean | None = None
        self._step = 0
        self._running = [0.0] * len(self.x)
        self._frozen_at: list[int] = []
        self._codec = (block_size, scale)
        self._world_size = world_size

    def step(self, ranks: Sequence[Gradients], lr: float | None = None) -> None:
        """One step with every rank's own gradients."""
        self._step += 1
        lr = self.options.lr if lr is None else lr
        if self._step <= self.options.freeze_step:
            self._warm_up(ranks, lr)
        else:
            self._compressed(ranks, lr)

    def _warm_up(self, ranks: Sequence[Gradients], lr: float) -> None:
        o = self.options
        for i in range(len(self.x)):
            given = [g[i] for g in ranks if g[i] is not None]
            if not given:
                continue
            g = self._signed(np.sum(np.stack(given), axis=0) / len(ranks))
            self.m[i] = o.betas[0] * self.m[i] + (1 - o.betas[0]) * g
            self.v[i] = o.betas[1] * self.v[i] + (1 - o.betas[1]) * g * g
            self.steps[i] += 1
            u = self._direction(i, self.steps[i]) + o.weight_decay * self.x[i]
            size, length = _norm(self.x[i]), _norm(u)
            c = float(np.clip(size / length, o.min_coeff, o.max_coeff)) if size > 0 and length > 0 else 1.0
            self._running[i] = o.coeff_beta * self._running[i] + (1 - o.coeff_beta) * c
            self.coefficients[i] = c
            self.x[i] = self.x[i] - lr * c * u

    def _compressed(self, ranks: Sequence[Gradients], lr: float) -> None:
        o = self.options
        used = [i for i in range(len(self.x)) if self.steps[i]]
        if self.mean is None:
            self._freeze(used)
        assert self.mean is not None
        local = [
            [o.betas[0] * self.m[i] + (1 - o.betas[0]) * self._signed(0.0 if g[i] is None else g[i]) for i in used]
            for g in ranks
        ]
        for i, flat in zip(used, self.mean(local), strict=True):
            averaged = flat.reshape(self.x[i].shape)
            g = (averaged - o.betas[0] * self.m[i]) / (1 - o.betas[0])
            self.m[i] = averaged
            if self.fresh:
                self.fresh[i] = o.betas[1] * self.fresh[i] + (1 - o.betas[1]) * np.where(self.v[i] == 0, 0.0, g * g)
            self.steps[i] += 1
            u0 = self._direction(i, self._frozen_at[i])
            u = u0 + o.weight_decay * self.x[i]
            self.x[i] = self.x[i] - lr * self.coefficients[i] * self.factors[i] * u
            if self.fresh:
                self.factors[i] = self._factor(i, _norm(u0), _norm(u))

    def _freeze(self, used: Sequence[int]) -> None:
        o = self.options
        self._frozen_at = list(self.steps)
        if self._world_size > 1:
            put_floor(self.v, o.variance_floor, self._codec[0])
        if not o.factor_min == o.factor_max == 1:
            self.fresh = [v.copy() for v in self.v]
        self.coefficients = [
            running / (1 - o.coeff_beta**steps) if steps else 1.0
            for running, steps in zip(self._running, self.steps, strict=True)
        ]
        dead = [self.v[i] == 0 for i in used]
        self.mean = CompressedMean(self._world_size, [self.x[i].size for i in used], *self._codec, masks=dead)

    def _signed(self, gradient: Floats | float) -> Floats | float:
        """The gradient of what is to become smaller."""
        return -gradient if self.options.maximize else gradient

    def _direction(self, i: int, variance_steps: int) -> Floats:
        """m̂ / (√v̂ + ε)."""
        return self._corrected(self.m[i], 0, self.steps[i]) / self._spread(self.v[i], variance_steps)

    def _spread(self, variance: Floats, steps: int) -> Floats:
        return np.sqrt(self._corrected(variance, 1, steps)) + self.options.eps

    def _corrected(self, moment: Floats, which: int, steps: int) -> Floats:
        return moment / (1 - self.options.betas[which] ** steps) if self.options.bias_correction else moment

    def _factor(self, i: int, length0: float, length: float) -> float:
        o = self.options
        live = self.v[i] != 0
        ratios = self._spread(self.v[i], self._frozen_at[i]) / self._spread(self.fresh[i], self.steps[i])
        r = float(ratios[live].max()) if live.any() else 1.0
        if o.weight_decay > 0:
            a = min(1.0, length0 / length) if length > 0 else 1.0
            r = r * a + 1 - a
        r = float(np.clip(r, o.factor_min, o.factor_max))
        last = self.factors[i]
        return float(np.clip(r, last * (1 - o.factor_threshold), last * (1 + o.factor_threshold)))


def _norm(x: Floats) -> float:
    return float(np.sqrt(np.sum(x * x)))
