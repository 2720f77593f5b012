"""Momentum and variance as all compressed optimizers keep them, and what is computed from them alike."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor


def adam_state(states: MutableMapping[Tensor, Any], p: Tensor) -> dict[str, Any]:
    """A parameter's state, made at its first use: Adam's, in fp32, as `torch.optim.AdamW` names it, and one count more.

    ``step`` counts the parameter's updates, ``variance_step`` the steps that its variance stands for; both are 0-dim
    fp32 on the CPU. ``exp_avg`` and ``exp_avg_sq`` have the parameter's strides.
    """
    state: dict[str, Any] = states[p]
    if "step" not in state:
        state["step"] = torch.zeros(())
        state["variance_step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
    return state


def corrections(state: Mapping[str, Tensor | float], group: Mapping[str, Any]) -> tuple[float, float]:
    """1/(1-β₁ᵗ) and √(1-β₂ᵀ) of a parameter that has made t steps, with a variance that stands for T; or 1 and 1."""
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1 / (1 - beta1 ** float(state["step"])), (1 - beta2 ** float(state["variance_step"])) ** 0.5


def dead_masks(variances: Sequence[Tensor]) -> list[Tensor] | None:
    """One bool tensor per variance, True for an entry whose variance is 0: it can have no update. None: there is none.

    Waits for the device.
    """
    return masks_if_any([v == 0 for v in variances])


def masks_if_any(masks: list[Tensor]) -> list[Tensor] | None:
    """These bool tensors; None: they are all False. Waits for the device."""
    filled = [mask.any() for mask in masks if mask.numel()]
    return masks if filled and bool(torch.stack(filled).any()) else None


def wanted(gradients: Sequence[Tensor], values: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """±g [+ λ·x]: the gradient of what is to become smaller, with weight decay where that is coupled.

    Args:
        gradients: fp32 tensors, not changed, and returned themselves where there is nothing to do.
        values: the parameters in fp32; see `fp32_values`.
        group: ``maximize``, ``adamw_mode``, ``weight_decay``.
    """
    made = list(gradients)
    if made and group["maximize"]:
        made = list(torch._foreach_neg(made))
    if made and not group["adamw_mode"] and group["weight_decay"]:
        made = list(torch._foreach_add(made, list(values), alpha=group["weight_decay"]))
    return made


def local_momenta(
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    values: Sequence[Tensor],
    group: Mapping[str, Any],
) -> list[Tensor]:
    """β₁·m + (1-β₁)·(±g [+ λ·x]) of this rank, in new fp32 tensors; rounded as fused kernels do.

    Args:
        momenta: fp32 tensors, not changed.
        gradients: None counts as zero.
        values: the parameters, read if weight decay is coupled; see `fp32_values`.
        group: ``betas``, ``maximize``, ``adamw_mode``, ``weight_decay``.
    """
    if not momenta:
        return []
    beta1 = group["betas"][0]
    sign = -1.0 if group["maximize"] else 1.0
    coupled = 0.0 if group["adamw_mode"] else sign * group["weight_decay"]
    local: list[Tensor] = []
    for some in batches(momenta):
        made = list(torch._foreach_mul(list(momenta[some]), beta1))
        given = [(i, g.float()) for i, g in enumerate(gradients[some]) if g is not None]
        targets, terms = [made[i] for i, _ in given], [g for _, g in given]
        if coupled:
            decayed = list(torch._foreach_mul(list(values[some]), coupled))
            if given:
                torch._foreach_add_([decayed[i] for i, _ in given], terms)
            targets, terms = made, decayed
        if terms:
            torch._foreach_add_(targets, torch._foreach_mul(terms, sign * (1 - beta1)))
        local += made
    return local


def batches(tensors: Sequence[Tensor]) -> list[slice]:
    """Which tensors to treat together: on GPUs all, in few launches; on CPUs one, so that temporaries stay in cache."""
    if not tensors:
        return []
    return [slice(None)] if tensors[0].is_cuda else [slice(i, i + 1) for i in range(len(tensors))]


def decay(values: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """Weight decay that is decoupled from the gradient: x <- x - lr·λ·x, in place."""
    if values and group["adamw_mode"] and group["weight_decay"]:
        torch._foreach_mul_(list(values), 1 - float(group["lr"]) * group["weight_decay"])
