"""What a step of Adam on CUDA tensors is given, whichever kernels make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASTER = "master"  # the key of a parameter's fp32 copy in its state


class Kind(NamedTuple):
    """What decides which kernel a tensor needs: dtypes of parameter and gradient, and whether there is an fp32 copy."""

    param: torch.dtype
    gradient: torch.dtype
    master: bool


@dataclass(frozen=True)
class Shapes:
    """What stays the same from step to step of a list of k tensors, each attribute with an entry per tensor.

    Attributes:
        numels: number of elements.
        kinds: as above.
        groups: number of the parameter group.
    """

    numels: tuple[int, ...]
    kinds: tuple[Kind, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One step of k tensors of one device. Those of one parameter have the same strides, which leave no gaps.

    Attributes:
        params, grads: (k,) fp32, bf16 or fp16; no gradient, no step.
        states: (k,) with fp32 tensors ``exp_avg``, ``exp_avg_sq`` and, where the kind says so, ``master``.
        memory: (4 k,) addresses of all parameters, first moments, second moments and fp32 copies; 0: none.
        gradients: (k,) addresses; 0: none. That of a gradient without elements is not 0.
        groups: the options of every group.
        found_inf, grad_scale: one fp32 number each, on the device, as a `torch.amp.GradScaler` gives them.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    states: Sequence[Mapping[str, Tensor]]
    memory: Sequence[int]
    gradients: Sequence[int]
    groups: Sequence[Mapping[str, Any]]
    found_inf: Tensor | None
    grad_scale: Tensor | None


Stepper = Callable[[Step], None]
"""Makes a step on the current stream; the host does not wait."""

Kernels = Callable[[Shapes, Tensor], Stepper]
"""What steps of such tensors are made with; the tensor, (k,) fp32 on their device, counts the steps of each."""
