"""Two compressed optimizers must not update the same parameters: one that another follows makes no more steps."""

from __future__ import annotations

import gc
import weakref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from onebit.compress import InputError

_Held = weakref.ref[torch.optim.Optimizer]
_owners = WeakTensorKeyDictionary()  # parameter -> _Held, the last optimizer to make its first step on it
_followers: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Held] = weakref.WeakKeyDictionary()


def take_over(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer, at its first step, the owner of its parameters.

    The owner before may exist for many reasons, such as a traceback or a notebook's history that holds it. Only if it
    makes another step while this one lives are there two, so that is what `owned_by_another` finds.
    """
    own = weakref.ref(optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            before = _alive(_owners[p]) if p in _owners else None
            if before is not None and before is not optimizer:
                _followers[before] = own
            _owners[p] = own


def owned_by_another(optimizer: torch.optim.Optimizer, rank: int) -> InputError | None:
    """Why an optimizer must not make a step: a later one, still alive, has made steps on its parameters; else None."""
    if _alive(_followers.get(optimizer)) is None:
        return None
    gc.collect()  # a learning rate's schedule and its optimizer hold each other after nobody else does
    follower = _alive(_followers.get(optimizer))
    if follower is None:
        return None
    kind = type(optimizer).__name__
    return InputError(
        f"rank {rank}: {kind}.step: another optimizer, {type(follower).__name__}, has begun to update parameters "
        f"of this {kind}, so that two would update them; give every parameter to one optimizer, with groups where "
        "options differ, or delete the one that is not used any more"
    )


def _alive(held: _Held | None) -> torch.optim.Optimizer | None:
    return None if held is None else held()
