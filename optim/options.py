"""Checks of optimizer options, each naming the option, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from operator import is_
from typing import Any

from torch import Tensor

from onebit.compress import InputError

# Options of other optimizers, and why there is no such thing here. A value of False or None asks for nothing.
_UNSUPPORTED = {
    "amsgrad": "a running maximum of the variance means nothing once the variance is frozen",
    "foreach": "the fastest kernels for the device are picked by themselves",
    "fused": "the fastest kernels for the device are picked by themselves",
    "capturable": "whether a step can be captured in a CUDA graph depends on its phase and not on an option",
    "differentiable": "signs have no derivative",
    "eps_inside_sqrt": "eps is added to the root, as in torch.optim.Adam",
    "max_grad_norm": "ranks must agree on a factor; call onebit.optim.clip_grad_norm_(optimizer, max_norm) before step",
    "cuda_aware": "whether MPI takes device memory is probed; see onebit.comm.make_backend",
    "comm_backend_name": "the option is called backend",
    "deepspeed": "no engine is needed",
}


class RightOptions:
    """Values of options that were found right, by group, so that a step looks only at those that have changed.

    Values are told apart by being other objects: a tensor that is written to on its device is not looked at again.

    Args:
        progress: names that a group has beside options, for how far it has come.
    """

    def __init__(self, progress: Collection[str]) -> None:
        self._apart = {"params", *progress}
        self._right: dict[int, list[Any]] = {}

    def changed(self, g: int, group: Mapping[str, Any]) -> bool:
        """Whether group `g` has other values than those that were remembered."""
        values, right = self._values(group), self._right.get(g)
        return right is None or len(right) != len(values) or not all(map(is_, values, right))

    def remember(self, g: int, group: Mapping[str, Any]) -> None:
        """The values that group `g` has are right."""
        self._right[g] = self._values(group)

    def _values(self, group: Mapping[str, Any]) -> list[Any]:
        return [value for name, value in group.items() if name not in self._apart]


def check_supported(owner: str, options: Mapping[str, Any], *, known: bool = True) -> None:
    """Raise InputError for an option that other optimizers have and these have not, with the reason.

    Args:
        known: False: every other name in `options` is refused too, as misspelt; True: it is somebody else's.
    """
    for name, value in options.items():
        if name in _UNSUPPORTED:
            if value is not None and value is not False:
                raise InputError(f"{owner}: {name}={value!r} is not supported: {_UNSUPPORTED[name]}; leave it out")
        elif not known:
            raise InputError(f"{owner}: there is no option {name!r}; help({owner}) lists those there are")


def check_flags(owner: str, group: Mapping[str, Any], *names: str) -> None:
    """Raise InputError unless the options with these names are True or False."""
    for name in names:
        if type(group[name]) is not bool:
            raise InputError(f"{owner}: {name} must be True or False, got {group[name]!r}")


def check_adam_options(owner: str, group: Mapping[str, Any]) -> None:
    """Raise InputError unless lr, betas, eps and weight_decay are in Adam's range."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise InputError(f"{owner}: lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}")
        lr = float(lr)
    check_number(owner, "lr", lr, 0.0, math.inf)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise InputError(f"{owner}: betas must be two numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        check_number(owner, f"betas[{index}]", beta, 0.0, 1.0)
    check_number(owner, "eps", group["eps"], 0.0, math.inf)
    check_number(owner, "weight_decay", group["weight_decay"], 0.0, math.inf)


def check_lamb_options(owner: str, group: Mapping[str, Any]) -> None:
    """Raise InputError if an option that Adam does not have is out of range, or eps is 0."""
    numbers = ("eps", "max_coeff", "min_coeff", "coeff_beta", "factor_max", "factor_min", "factor_threshold")
    for name in numbers:
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise InputError(f"{owner}: {name} must be a number of at least 0, got {value!r}")
    if group["eps"] == 0:
        raise InputError(f"{owner}: eps must be more than 0, or one entry's 0/0 spoils the norm of its tensor")
    for name in ("coeff_beta", "factor_threshold"):
        if group[name] >= 1:
            raise InputError(f"{owner}: {name} must be less than 1, got {group[name]!r}")
    for low, high in (("min_coeff", "max_coeff"), ("factor_min", "factor_max")):
        if group[low] > group[high]:
            raise InputError(f"{owner}: {low}={group[low]!r} must be at most {high}={group[high]!r}")


def check_freeze_step(owner: str, freeze_step: Any) -> None:
    """Raise InputError unless it is an int of at least 1 or ``"auto"``."""
    if freeze_step != "auto" and (type(freeze_step) is not int or freeze_step < 1):
        raise InputError(
            f"{owner}: freeze_step must be an int of at least 1, the number of warm-up steps, or 'auto', got "
            f"{freeze_step!r}; 15 to 25 % of all steps is usual"
        )


def check_count(owner: str, name: str, value: Any, what: str, least: int = 1) -> None:
    """Raise InputError unless an option is None or an int of at least `least`; `what` says what it counts."""
    if value is not None and (type(value) is not int or value < least):
        raise InputError(f"{owner}: {name} must be None or an int of at least {least}, {what}, got {value!r}")


def check_number(owner: str, name: str, value: Any, low: float, high: float) -> None:
    """Raise InputError unless a value is a number of [low, high)."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) < high:
        raise InputError(f"{owner}: {name} must be a number in [{low:g}, {high:g}), got {value!r}")
