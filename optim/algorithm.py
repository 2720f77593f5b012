"""What an optimizer says of its algorithm, so that `onebit.optim.base` can make its steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from onebit.optim.exchange import Exchange, GroupReducers


class Algorithm:
    """The hooks of `CompressedOptimizer`: three that every algorithm has, and others with what holds for most.

    What an algorithm must know of a group to go on from a checkpoint is in the group's options or in ``state``, so that
    torch saves it.
    """

    # Options of a group that tell how far it has come, with their start; a state of torch's own Adam lacks them.
    _progress: ClassVar[Mapping[str, Any]] = {"step": 0}

    # Keys of a parameter's state beside Adam's; see `onebit.optim.state_keys`.
    _own_keys: ClassVar[frozenset[str]] = frozenset()

    # Whether a rank holds a slice of what a state has in its parameter's shape; see `onebit.optim.sharding`.
    _shard = False

    @property
    def _algorithm(self) -> str:
        """The name that states bear, by which another algorithm's are known: of the class that has `_exchange`."""
        return next(kind.__name__ for kind in type(self).__mro__ if "_exchange" in vars(kind))

    @abstractmethod
    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise InputError if an option of a group is out of range."""

    @abstractmethod
    def _planned(self, group: Mapping[str, Any], step: int) -> str:
        """How a group makes the step that follows its first `step` ones: a function of options and progress alone."""

    @abstractmethod
    def _exchange(self, group: dict[str, Any], reducers: GroupReducers) -> Exchange:
        """What one group needs for its next step, staged or sent and received; only error feedback has changed."""

    def _averages(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's next step is made of the exact mean gradient."""
        return False

    def _is_staged(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's next exchange is staged, and can so be made before gradients are there."""
        return False

    def _look_at_others(
        self, group: Mapping[str, Any], reducers: GroupReducers, gradients: Sequence[Tensor | None]
    ) -> None:
        """Say what is to be said about gradients that a staged compressed exchange did not send."""

    def _count_made(self, group: dict[str, Any]) -> None:
        """Bring the host's counts up to date with a step of a group that `DeviceExchange.settle` has made."""

    def _regrouped(self, index: int) -> None:
        """Parameters that had no state have left this group."""

    def _common_value(self, p: Tensor) -> Tensor:
        """What must have the same bits on every rank where a step is to go on: the parameter itself."""
        return p

    def _settle_slices(self) -> None:
        """What ranks that hold slices of the state settle, after they have agreed about the rest; collective."""
