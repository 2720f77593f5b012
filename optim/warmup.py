"""A step on gradients averaged in fp32, as every group makes them until its variance is frozen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from onebit.optim.dense import MeanExchange
from onebit.optim.exchange import GroupReducers
from onebit.optim.freeze import measure, observe
from onebit.optim.fused_groups import FusedGroups


class WarmupStep(MeanExchange):
    """The exchange of such a step; a subclass says what is done with the means.

    It also measures the variance for an automatic freeze, and puts the floor under it when compressed steps follow.

    Args:
        optimizer, group, reducers: whose step it is.
        parts: how many ranks together hold one variance, each a part of it.
    """

    _optimizer: FusedGroups

    def __init__(self, optimizer: FusedGroups, group: dict[str, Any], reducers: GroupReducers, parts: int = 1) -> None:
        params = group["params"]
        states = [optimizer.state.get(p, {}) for p in params]
        variance = measure(group, states, params[0].device) if params else None
        if variance is not None and parts > 1:
            variance = variance * parts  # so that the mean over ranks is the whole
        super().__init__(optimizer, group, reducers, note=variance)

    def commit(self) -> None:
        """As of `MeanExchange`."""
        params, means = self._pairs()
        if params:
            self._update(params, means)
        if self._mean.note is not None:
            observe(self._group, self._mean.note, self._reducers.backend.rank)
        self._optimizer._raise_variances(self._group)

    @abstractmethod
    def _update(self, params: Sequence[Tensor], means: list[Tensor]) -> None:
        """Update parameters of the group, for which some rank has a gradient, and their moments."""
