"""Gradients that a `torch.amp.GradScaler` has scaled, as `step` reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unscaled(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients themselves where no scaler drives the optimizer; else without the scale, in new fp32 tensors."""
    here = [g for g in gradients if g is not None]
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if not here or (scale is None and found_inf is None):
        return list(gradients)
    factor = torch.ones((), device=here[0].device)
    if scale is not None:
        factor = factor / scale.to(factor)
    if found_inf is not None:  # this rank's verdict reaches the others as a NaN does
        factor = torch.where(found_inf.to(factor) > 0, torch.nan, factor)
    results = iter(torch._foreach_mul([g.float() for g in here], factor))
    return [None if g is None else next(results) for g in gradients]
