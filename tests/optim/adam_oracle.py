"""Adam from its definition, one step in float64, and how far a step that is computed in fp32 and stored may be off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

# Rounding to nearest is off by at most this part of the value: half a unit of the last of 24, 8 and 11 binary digits.
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# The values of a step go through at most eight roundings to fp32, one after the other.
ARITHMETIC = 8 * HALF_UNIT[torch.float32]
SMALLEST = 2.0**-25  # half the distance between the smallest numbers of fp16


def as_float64(tensor: Tensor) -> Array:
    """The values, in row-major order."""
    return tensor.detach().double().numpy().copy()


def step(p: Array, g: Array, m: Array, v: Array, t: int, options: Mapping[str, Any]) -> tuple[list[Array], list[Array]]:
    """Parameter and moments after step t, and of each the size of what was added up for it."""
    lr, (beta1, beta2), decay = float(options["lr"]), options["betas"], options["weight_decay"]
    if options["maximize"]:
        g = -g
    size_g = np.abs(g)
    if options["adamw_mode"]:
        p = p - lr * decay * p
    else:
        g, size_g = g + decay * p, size_g + decay * np.abs(p)
    m, size_m = beta1 * m + (1 - beta1) * g, beta1 * np.abs(m) + (1 - beta1) * size_g
    v, size_v = beta2 * v + (1 - beta2) * g * g, beta2 * v + (1 - beta2) * size_g * size_g
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if options["bias_correction"] else (1.0, 1.0)
    rate = lr / c1 / (np.sqrt(v / c2) + options["eps"])
    return [p - rate * m, m, v], [np.abs(p) + rate * size_m, size_m, size_v]


class Shadow:
    """Remembers a set of parameters and their state before a step, and tells afterwards what the step got wrong."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        self._params = params
        self._options = optimizer.param_groups[0]
        self._before = [self._read(p) for p in params]

    def check(self) -> None:
        """Compare with the definition; a parameter without a gradient must be as it was."""
        for p, before in zip(self._params, self._before, strict=True):
            after = self._read(p)
            if p.grad is None:
                assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
                continue
            value, m, v, steps = before
            g = as_float64(p.grad)
            wanted, sizes = step(value, g, m, v, int(steps) + 1, self._options)
            kinds = [p.dtype, *(self._optimizer.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq"))]
            for got, want, dtype, size in zip(after[:3], wanted, kinds, sizes, strict=True):
                bound = HALF_UNIT[dtype] * np.abs(want) + ARITHMETIC * size + SMALLEST * (dtype == torch.float16)
                assert np.all(np.abs(got - want) <= bound * 1.01)
            assert after[3] == steps + 1

    def _read(self, p: Tensor) -> tuple[Array, Array, Array, Array]:
        state = self._optimizer.state.get(p, {})
        zero = torch.zeros(p.shape)
        moments = (as_float64(state.get(key, zero)) for key in ("exp_avg", "exp_avg_sq"))
        return as_float64(p), *moments, as_float64(state.get("step", torch.zeros(())))  # type: ignore[return-value]
