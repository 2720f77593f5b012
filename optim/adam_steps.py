"""What 1-bit Adam's three kinds of steps do to parameters and moments, once what they are made of is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from onebit.optim.master import fp32_values, write_back
from onebit.optim.moments import batches, corrections, decay, wanted

States = Sequence[dict[str, Any]]


def dense_step(group: Mapping[str, Any], params: Sequence[Tensor], states: States, means: list[Tensor]) -> None:
    """Adam's own step on mean gradients, in torch's own functions."""
    if any(s["step"] != s["variance_step"] for s in states):  # it was frozen for a while; torch knows one count
        take_in(group, params, states, means, [1] * len(states))
        move(group, params, states)
        return
    values = fp32_values(params, states, group)
    steps = [s["step"] for s in states]
    counted = steps if group["bias_correction"] else [torch.full_like(s, torch.inf) for s in steps]
    (adamw if group["adamw_mode"] else adam)(
        values,
        means,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        counted,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    if counted is not steps:
        torch._foreach_add_(steps, 1.0)
    torch._foreach_copy_([s["variance_step"] for s in states], steps)
    write_back(params, values)


def take_in(
    group: Mapping[str, Any], params: Sequence[Tensor], states: States, means: list[Tensor], ages: list[int]
) -> None:
    """m <- β₁·m + (1-β₁)·g and v <- β₂ᵏ·v + (1-β₂ᵏ)·g², for mean gradients that stand for k steps, `ages`."""
    beta1, beta2 = group["betas"]
    gradients = wanted(means, fp32_values(params, states, group), group)
    for g, state, age in zip(gradients, states, ages, strict=True):
        kept = beta2**age
        state["exp_avg"].lerp_(g, 1 - beta1)
        if age:
            state["exp_avg_sq"].mul_(kept).addcmul_(g, g, value=1 - kept)
            state["variance_step"] += age


def move(group: Mapping[str, Any], params: Sequence[Tensor], states: States) -> None:
    """x <- x - lr·λ·x - lr·(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵀ)) + ε), with the m and v that there are now.

    Rounded as `onebit.optim.kernels.StepKernels.decode_update` says.
    """
    values = fp32_values(params, states, group)
    torch._foreach_add_([s["step"] for s in states], 1.0)
    rates, roots = zip(*(corrections(s, group) for s in states), strict=True)
    variances, momenta = [s["exp_avg_sq"] for s in states], [s["exp_avg"] for s in states]
    for some in batches(values):
        decay(values[some], group)
        spread = _square_roots(variances[some])
        torch._foreach_mul_(spread, [1 / root for root in roots[some]])
        torch._foreach_add_(spread, group["eps"])
        moved = torch._foreach_mul(momenta[some], [float(group["lr"]) * rate for rate in rates[some]])
        torch._foreach_div_(moved, spread)
        torch._foreach_sub_(values[some], moved)
    write_back(params, values)


def _square_roots(tensors: list[Tensor]) -> list[Tensor]:
    """Of fp32 tensors, rounded once: torch's on the CPU are MKL's, which are a unit off here and there."""
    if tensors[0].is_cuda:
        return list(torch._foreach_sqrt(tensors))
    made = [torch.empty_like(t) for t in tensors]
    for t, root in zip(tensors, made, strict=True):
        np.sqrt(t.numpy(), out=root.numpy())
    return made
