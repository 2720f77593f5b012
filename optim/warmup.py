"""A step on gradients averaged in fp32, as every group makes them until its variance is frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from onebit.optim.dense import MeanGradients
from onebit.optim.exchange import GroupReducers
from onebit.optim.freeze import measure, observe
from onebit.optim.fused_groups import FusedGroups


class WarmupStep(ABC):
    """The staged exchange of such a step; a subclass says what is done with the means.

    It also measures the variance for an automatic freeze, and puts the floor under it when compressed steps follow.

    Args:
        optimizer, group, reducers: whose step it is.
        parts: how many ranks together hold one variance, each a part of it.
    """

    def __init__(self, optimizer: FusedGroups, group: dict[str, Any], reducers: GroupReducers, parts: int = 1) -> None:
        self._optimizer = optimizer
        self._rank = reducers.backend.rank
        self._group = group
        params = group["params"]
        states = [optimizer.state.get(p, {}) for p in params]
        variance = measure(group, states, params[0].device) if params else None
        if variance is not None and parts > 1:
            variance = variance * parts  # so that the mean over ranks is the whole
        self._mean = self.sending = MeanGradients(
            params, optimizer._gradients(group), reducers, note=variance, averaged=optimizer.gradients_averaged
        )

    def all_finite(self) -> Tensor:
        """0-dim bool, the same on every rank."""
        return self._mean.all_finite()

    def undo(self) -> None:
        """Nothing was changed."""
        self._mean.cancel()

    def commit(self) -> None:
        """Make the step; the group's step count is already that of the step."""
        used = [i for i, present in enumerate(self._mean.present) if present]
        if used:
            self._update(used)
        if self._mean.note is not None:
            observe(self._group, self._mean.note, self._rank)
        self._optimizer._raise_variances(self._group)

    @abstractmethod
    def _update(self, used: Sequence[int]) -> None:
        """Update the group's parameters of these indices, for which some rank has a gradient, and their moments."""
