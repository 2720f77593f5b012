"""Which parameters of a group take part once warm-up is over, and their states, looked up once for many steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import is_
from typing import Any, overload

import torch
from torch import Tensor

from onebit.optim.exchange import GroupReducers

Counts = tuple[list[float], list[float]]
"""The steps that each parameter has made, and the steps that its variance stands for."""

_COUNTED = ("step", "variance_step")
_log = logging.getLogger(__name__)


class Known:
    """The parameters of a group that warm-up has made a variance for; the others are left alone.

    To look up and to count hundreds of small tensors one by one takes longer than to launch a whole step. So this is
    kept from step to step, `still` tells whether it is right, and the counts in the states are made views of one
    tensor.

    Args:
        params: of the group.
        states: of the optimizer.

    Attributes:
        indices: of the parameters, in the group.
        params: the parameters.
        states: their states.
    """

    def __init__(self, params: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]]) -> None:
        self._all = list(params)
        self._found = [states.get(p) for p in params]
        self.indices = [i for i, state in enumerate(self._found) if _has_variance(state)]
        self._others = [i for i, state in enumerate(self._found) if not _has_variance(state)]
        self.params = [params[i] for i in self.indices]
        self.states = [states[p] for p in self.params]
        self._counts = torch.tensor([[float(state[key]) for state in self.states] for key in _COUNTED])
        self._views = [list(row.unbind()) for row in self._counts]
        for key, views in zip(_COUNTED, self._views, strict=True):
            for state, view in zip(self.states, views, strict=True):
                state[key] = view

    def still(self, params: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether it is what would be made of these, with the same objects in the same places."""
        return (
            len(params) == len(self._all)
            and all(map(is_, params, self._all))
            and all(map(is_, map(states.get, params), self._found))
            and all(
                all(map(is_, [state.get(key) for state in self.states], views))
                for key, views in zip(_COUNTED, self._views, strict=True)
            )
            and not any(_has_variance(self._found[i]) for i in self._others)
        )

    @cached_property
    def like(self) -> list[Tensor]:
        """fp32 tensors shaped as the parameters, on their devices, all elements of one device in one place."""
        number = {device: torch.empty((), device=device) for device in {p.device for p in self.params}}
        return [number[p.device].expand(p.shape) for p in self.params]

    def count(self) -> None:
        """Each of the parameters has made one more step."""
        self._counts[0].add_(1.0)

    def counts(self) -> Counts:
        """Return both counts of every parameter."""
        steps, variance_steps = self._counts.tolist()
        return steps, variance_steps

    def of(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Those of the parameters, of the gradients of the whole group, as they are when they are looked at."""
        return _Picked(gradients, self.indices) if self._others else gradients

    def warn_of_others(self, gradients: Sequence[Tensor | None], reducers: GroupReducers) -> None:
        """Say once what to do about a parameter that is left alone, when it first has a gradient on this rank."""
        late = [i for i in self._others if gradients[i] is not None]
        if late and reducers.first_warning():
            _log.warning(
                "rank %d: parameters %s have their first gradient after the freeze, so there is no variance for them "
                "and they are not updated; give them to add_param_group, which makes a warm-up of their own, or let "
                "OnebitAdam take them in by its variance_refresh",
                reducers.backend.rank,
                late,
            )


class _Picked(Sequence[Tensor | None]):
    """Some items of a list that may change."""

    def __init__(self, items: Sequence[Tensor | None], indices: Sequence[int]) -> None:
        self._items = items
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor | None]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor | None] | None:
        if isinstance(index, slice):
            return [self._items[i] for i in self._indices[index]]
        return self._items[self._indices[index]]


def _has_variance(state: Mapping[str, Any] | None) -> bool:
    return state is not None and "exp_avg_sq" in state
