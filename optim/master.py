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
        if p.dtype == torch.float32:
            values.append(p)
        elif group["master_weights"]:
            if "master" not in state:
                state["master"] = p.float()
            values.append(state["master"])
        else:
            values.append(p.float())
    return values


def write_back(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Round `fp32_values` to the parameters that they are the values of."""
    rounded = [(p, value) for p, value in zip(params, values, strict=True) if p is not value]
    if rounded:
        torch._foreach_copy_([p for p, _ in rounded], [value for _, value in rounded])
