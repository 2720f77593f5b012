"""What a step must not be made of, found before anything moves: parameters, options, gradients, devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebit.comm.tensors import describe, shared_places
from onebit.compress import InputError
from onebit.compress.kernels import DTYPES
from onebit.optim.owners import owned_by_another

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer


def check_parameters(owner: str, params: Sequence[Tensor]) -> None:
    """Raise InputError unless these can be the parameters of a group of the optimizer `owner`."""
    if len(set(params)) != len(params):
        raise InputError(f"{owner}: a parameter is in its group twice; give each once")
    devices = {p.device for p in params}
    if len(devices) > 1:
        raise InputError(
            f"{owner}: the parameters of a group are on {' and '.join(sorted(map(str, devices)))}; "
            "give each device a group of its own"
        )
    for index, p in enumerate(params):
        if p.dtype not in DTYPES or p.layout != torch.strided:
            layout = "" if p.layout == torch.strided else f" with layout {p.layout}"
            raise InputError(
                f"{owner}: parameter {index} must be dense float32, bfloat16 or float16, got "
                f"{describe(p)}{layout}; leave it out or convert it"
            )
        shared = shared_places(p)
        if shared is not None:
            raise InputError(f"{owner}: parameter {index} {shared}")


def refuse_capture(owner: str) -> None:
    """Raise InputError in the capture of a CUDA graph: a replay would count no step and never change its phase."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise InputError(
            f"{owner}.step: a CUDA graph is being captured, in which steps would not be counted and "
            "phases not change; capture forward and backward, and call step after each replay; or capture "
            "onebit.comm.CompressedAllreduce and onebit.optim.FusedAdam(capturable=True)"
        )


def refuse_without_coefficients(states: Sequence[Mapping[str, Any]], group: Mapping[str, Any]) -> None:
    """Raise InputError for a state that another optimizer made and that starts past the freeze."""
    if any("coeff" not in state for state in states):
        raise InputError(
            f"OnebitLamb: step {group['step'] + 1} comes after freeze_step={group['freeze_step']!r}, but the loaded "
            "state has no coefficients, for OnebitLamb did not make its warm-up; set the group's freeze_step to a "
            "later step"
        )


def refused(optimizer: CompressedOptimizer) -> InputError | None:
    """Why this rank must not make the step that it is asked for; None if nothing is wrong."""
    return (
        owned_by_another(optimizer, optimizer.backend.rank)
        or _refused_option(optimizer)
        or refused_gradient(optimizer)
        or _refused_averages(optimizer)
    )


def refused_gradient(optimizer: CompressedOptimizer) -> InputError | None:
    """Why this rank's gradients cannot be averaged; None if they can."""
    for group in optimizer.param_groups:
        for index, g in enumerate([p.grad for p in group["params"]]):
            if g is not None and g.layout is not torch.strided:
                return InputError(
                    f"{type(optimizer).__name__}: the gradient of parameter {index}, "
                    f"{describe(group['params'][index])}, is sparse; use dense gradients (sparse=False in nn.Embedding)"
                )
    return None


def refused_devices(optimizer: CompressedOptimizer) -> InputError | None:
    """Why this rank's parameters cannot travel together; None if they can."""
    devices = {str(p.device) for group in optimizer.param_groups for p in group["params"]}
    backend = optimizer.backend
    if backend.size == 1 or backend.device_type is None or len(devices) < 2:
        return None
    return InputError(
        f"rank {backend.rank}: {type(optimizer).__name__}: there are parameters on {' and '.join(sorted(devices))}, "
        f"and the {backend.name!r} backend carries those of one {backend.device_type} device; give each device an "
        "optimizer with a backend of its own"
    )


def _refused_option(optimizer: CompressedOptimizer) -> InputError | None:
    """Why an option that was set since the last look is out of range; None if none is."""
    for g, group in enumerate(optimizer.param_groups):
        if optimizer._right_options.changed(g, group):
            try:
                optimizer._check_loaded_options(group)
            except InputError as error:
                return InputError(f"rank {optimizer.backend.rank}: group {g}: {error}")
            optimizer._right_options.remember(g, group)
    return None


def _refused_averages(optimizer: CompressedOptimizer) -> InputError | None:
    """Why this step cannot be made of gradients that another has averaged, or would average; None if it can."""
    refusal = None if optimizer.averager is None else optimizer.averager.before_step()
    if refusal is not None or not optimizer.gradients_averaged or optimizer.averages_next_step():
        return refusal
    return InputError(
        f"rank {optimizer.backend.rank}: {type(optimizer).__name__}: the gradients of this step were averaged, but it "
        "compresses and needs each rank's own: average only if averages_next_step() says so, and change no option "
        "between backward and step"
    )
