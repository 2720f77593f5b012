"""Copies of an optimizer: made anew from its options, with its state, as a checkpoint is."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from onebit.comm import Backend
from onebit.compress import InputError

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer


def duplicate(optimizer: CompressedOptimizer, settings: dict[str, Any], memo: dict[int, Any]) -> CompressedOptimizer:
    """A deep copy, of parameters and state alike; the backend is the same object."""
    groups, options = copy.deepcopy((optimizer.param_groups, _options(optimizer)), memo)
    return remade(type(optimizer), groups, {**options, **settings}, copy.deepcopy(optimizer.state_dict(), memo))


def reduced(optimizer: CompressedOptimizer, settings: dict[str, Any]) -> tuple[Any, ...]:
    """What pickle keeps: a call of `remade`.

    Raises:
        InputError: the backend or the local group is an object of this process.
    """
    for given in (settings["backend"], settings["local_group"]):
        if given is not None and not isinstance(given, (str, int)):
            what = f"the backend {given.name!r}" if isinstance(given, Backend) else f"a {type(given).__name__}"
            raise InputError(
                f"{type(optimizer).__name__}: it cannot be pickled, for it has {what}, which belongs to this process; "
                "save its state_dict(), or give the backend by its name"
            )
    made = (type(optimizer), optimizer.param_groups, {**_options(optimizer), **settings}, optimizer.state_dict())
    return remade, made


def remade(
    kind: type[CompressedOptimizer], groups: list[dict[str, Any]], options: dict[str, Any], state: dict[str, Any]
) -> CompressedOptimizer:
    """An optimizer of these groups that goes on where the state ends."""
    optimizer: CompressedOptimizer = kind([dict(group) for group in groups], **options)
    optimizer.load_state_dict(state)
    return optimizer


def _options(optimizer: CompressedOptimizer) -> dict[str, Any]:
    """The constructor's options that are a group's too, with their default values."""
    others = {"compress", *optimizer._progress}
    return {name: value for name, value in optimizer.defaults.items() if name not in others}
