"""Checks of optimizer options, each naming the option, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from onebit.compress import InputError


def check_adam_options(owner: str, group: Mapping[str, Any]) -> None:
    """Raise InputError unless lr, betas, eps and weight_decay are in Adam's range."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise InputError(f"{owner}: lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}")
        lr = float(lr)
    _check_number(owner, "lr", lr, 0.0, math.inf)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise InputError(f"{owner}: betas must be two numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        _check_number(owner, f"betas[{index}]", beta, 0.0, 1.0)
    _check_number(owner, "eps", group["eps"], 0.0, math.inf)
    _check_number(owner, "weight_decay", group["weight_decay"], 0.0, math.inf)


def check_freeze_step(owner: str, freeze_step: Any) -> None:
    """Raise InputError unless it is an int of at least 1."""
    if type(freeze_step) is not int or freeze_step < 1:
        raise InputError(
            f"{owner}: freeze_step must be an int of at least 1, the number of warm-up steps, got {freeze_step!r}; 15 "
            "to 25 % of all steps is usual"
        )


def _check_number(owner: str, name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) < high:
        raise InputError(f"{owner}: {name} must be a number in [{low:g}, {high:g}), got {value!r}")
