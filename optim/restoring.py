"""A state that torch has loaded, brought into the form that compressed optimizers keep it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from onebit.optim.loading import own_options
from onebit.optim.state_keys import COUNTS, EXTRA, SCALARS, SHAPED, SLICES

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer


def restore_tensors(optimizer: CompressedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Undo what torch does to what it loads: all is fp32, counts are on the CPU, what is whole has p's strides."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    sliced = SLICES in state_dict.get(EXTRA, {})
    for index, p in zip(saved, own, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if key in COUNTS:
                optimizer.state[p][key] = value.to("cpu", torch.float32, copy=True).view(())
            elif key in SHAPED and sliced:
                optimizer.state[p][key] = value.to(p.device, torch.float32, copy=True)
            elif key in SHAPED and (p.dtype != torch.float32 or value.stride() != p.stride()):
                optimizer.state[p][key] = torch.empty_like(p, dtype=torch.float32).copy_(value)
            elif key in SCALARS and p.dtype != torch.float32:
                optimizer.state[p][key] = value.to(p.device, torch.float32, copy=True)


def restore_options(optimizer: CompressedOptimizer, before: Sequence[Mapping[str, Any]]) -> None:
    """Give each group the options that were not saved, as in a state of torch's own Adam: progress from its steps.

    Args:
        before: the groups as they were before the state was loaded; other options stay as they are there.
    """
    for group, own in zip(optimizer.param_groups, before, strict=True):
        steps = [int(optimizer.state[p]["step"]) for p in group["params"] if "step" in optimizer.state.get(p, {})]
        group.update(own_options(group, own))
        for key, value in {**own, **optimizer._progress, "step": max(steps, default=0)}.items():
            group.setdefault(key, value)
