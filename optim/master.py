"""The fp32 numbers that an update is computed in, and their way back to parameters of any dtype."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor


def fp32_values(
    params: Sequence[Tensor], states: Sequence[MutableMapping[str, Any]], group: Mapping[str, Any]
) -> list[Tensor]:
    """The values of parameters in fp32, one tensor each, with the parameter's strides.

    A parameter in fp32 is its own. For another, ``master_weights`` decides: its fp32 master, ``state["master"]``, which
    starts as the parameter when it is first asked for; or a widened copy. Change them in place, then `write_back`.
    """
    values = []
    for p, state in zip(params, states, strict=True):
        master = master_of(p, state, group)
        values.append(p if p.dtype == torch.float32 else p.float() if master is None else master)
    return values


def master_of(p: Tensor, state: MutableMapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """``state["master"]``, made if it is asked for first; None: the parameter is in fp32, or the group wants none."""
    if p.dtype == torch.float32 or not group["master_weights"]:
        return None
    if "master" not in state:
        state["master"] = p.float()
    master: Tensor = state["master"]
    return master


def write_back(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Round `fp32_values` to the parameters that they are the values of."""
    rounded = [(p, value) for p, value in zip(params, values, strict=True) if p is not value]
    if rounded:
        torch._foreach_copy_([p for p, _ in rounded], [value for _, value in rounded])
