"""Clipping of gradients that have not been averaged yet: the ranks agree on one factor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.comm import Backend, make_backend
from onebit.comm.tensors import shared_places
from onebit.compress import InputError
from onebit.optim.untraced import untraced


@untraced
@torch.no_grad()
def clip_grad_norm_(
    source: torch.optim.Optimizer | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    backend: object = None,
) -> Tensor:
    """Scale the gradients of all ranks by one factor, min(1, max_norm / total norm), in place; collective.

    The total norm is the power mean of the ranks' own norms, (mean over ranks of ‖gᵢ‖ᵖ)^(1/p), or the largest for the
    infinity norm. It costs one number per rank, where the mean gradient's own norm would cost a dense average. For p
    of 1 or more it is never less than that, so a clipped mean gradient is at most `max_norm` long; where gradients are
    mostly noise that differs between ranks it is more, about √n times. With one rank it is
    `torch.nn.utils.clip_grad_norm_`.

    A factor per rank would be wrong: a rank with a large gradient would count for less, and the mean would point
    elsewhere.

    Args:
        source: an optimizer, all its parameters; or parameters. Gradients may be missing on any rank, or sparse.
        max_norm: what the total norm becomes at most.
        norm_type: p > 0, or infinity.
        error_if_nonfinite: raise, on every rank, where the total norm is not finite; else gradients become what torch
            makes of them, zero or NaN, and onebit's optimizers skip that step on every rank.
        backend: None: that of the optimizer if it is one of onebit's; otherwise as for `onebit.comm.make_backend`.

    Returns:
        The total norm before clipping, a 0-dim tensor, the same bits on every rank.

    Raises:
        InputError: an option is out of range, the norm is not finite and that was asked for, or the optimizer was made
            with ``overlap=True``; on every rank alike.
            On this rank alone, for a gradient whose elements share memory; nothing was sent or changed.
        TransportError: a rank did not take part within the timeout; nothing was changed.
    """
    p = _checked(max_norm, norm_type)
    params, group = _parameters(source, backend)
    gradients = [param.grad for param in params if param.grad is not None]
    _refuse_shared(gradients, group.rank)
    device = gradients[0].device if gradients else params[0].device if params else torch.device("cpu")
    total = _over_ranks(_norm(gradients, p, device), p, group)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise InputError(
            f"rank {group.rank}: clip_grad_norm_: the norm of order {norm_type} over {group.size} ranks is "
            f"{total.item()}; some rank has a gradient that is not finite: error_if_nonfinite=False lets the optimizer "
            "skip the step"
        )
    factor = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)  # torch's own rule
    for place, listed in _by_device([g for g in gradients if g.layout == torch.strided]).items():
        torch._foreach_mul_(listed, factor.to(place))
    for gradient in gradients:
        if gradient.layout != torch.strided:
            gradient.mul_(factor.to(gradient.device))
    return total


def _checked(max_norm: float, norm_type: float) -> float:
    p = _number(norm_type)
    if not p > 0:
        raise InputError(f"clip_grad_norm_: norm_type must be more than 0, got {norm_type!r}")
    if not _number(max_norm) >= 0:
        raise InputError(f"clip_grad_norm_: max_norm must be at least 0, got {max_norm!r}")
    return p


def _refuse_shared(gradients: Sequence[Tensor], rank: int) -> None:
    """Raise InputError for a gradient that cannot be scaled in place."""
    for index, gradient in enumerate(gradients):
        shared = shared_places(gradient) if gradient.layout == torch.strided else None
        if shared is not None:
            raise InputError(f"rank {rank}: clip_grad_norm_: gradient {index} {shared}")


def _number(value: Any) -> float:
    """What torch takes for a number, ``"inf"`` too; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _parameters(
    source: torch.optim.Optimizer | Tensor | Iterable[Tensor], backend: object
) -> tuple[list[Tensor], Backend]:
    """The parameters, and what the ranks agree through."""
    if isinstance(source, torch.optim.Optimizer):
        if getattr(source, "_overlap", None) is not None:
            raise InputError(
                f"clip_grad_norm_: {type(source).__name__}(overlap=True) sends gradients during backward, before their "
                "norm is known; make it with overlap=False to clip"
            )
        params = [param for group in source.param_groups for param in group["params"]]
        own = getattr(source, "backend", None)
        backend = own if backend is None and isinstance(own, Backend) else backend
    else:
        params = [source] if isinstance(source, Tensor) else list(source)
    return params, make_backend(backend, device=params[0].device if params else None)


def _norm(gradients: Sequence[Tensor], p: float, device: torch.device) -> Tensor:
    """This rank's norm over all gradients, as torch computes it: the norm of the tensors' norms."""
    dense = [g.coalesce().values() if g.layout == torch.sparse_coo else g for g in gradients]
    norms = [norm for listed in _by_device(dense).values() for norm in torch._foreach_norm(listed, p)]
    if not norms:
        return torch.zeros((), device=device)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]), p)
    return total


def _over_ranks(norm: Tensor, p: float, group: Backend) -> Tensor:
    """The power mean of every rank's norm, from the same numbers in the same order on each."""
    if group.size == 1:
        return norm
    carrier = norm.device if group.device_type in (None, norm.device.type) else torch.device(group.device_type or "cpu")
    mine = norm.to(carrier, torch.float64).view(1)
    theirs = mine.new_empty(group.size)
    group.all_gather(theirs, mine).wait()
    largest = theirs.max()
    if p == math.inf:
        return largest.to(norm.device, torch.float32)
    scaled = theirs / torch.where(largest > 0, largest, 1.0)  # a large p must not overflow
    mean = torch.where(largest.isfinite(), scaled.pow(p).mean().pow(1 / p) * largest, largest)
    return mean.to(norm.device, torch.float32)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    """Those that have elements, in their order."""
    places: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            places.setdefault(tensor.device, []).append(tensor)
    return places
