"""What all that compresses FSDP's gradients has in common: a hook per unit, error feedback, counts, and an end."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from onebit.comm.fsdp_units import Unit
from onebit.comm.residual import Residual
from onebit.comm.stats import Stats
from onebit.compress.errors import InputError

VERSION = 1


class UnitHook(ABC):
    """Does for one unit what FSDP asks for, with error feedback of its own.

    Attributes:
        unit: whose gradients.
        residual: the error feedback.
        calls: how many times it was asked.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.residual = Residual()
        self.calls = 0

    @abstractmethod
    def install(self) -> None:
        """Have FSDP call it."""

    @abstractmethod
    def remove(self) -> None:
        """Have FSDP do what it does by itself."""

    @property
    @abstractmethod
    def stats(self) -> Stats:
        """Bytes and times so far."""


class UnitHooks:
    """The hooks of a model's units.

    Args:
        model: the root; it can be compressed once in each of the ways there are.
        hooks: one per unit.
        taken: the models that are compressed in this way.

    Raises:
        InputError: the model is compressed already, or FSDP takes no hook for one of its modules; nothing was changed.
    """

    def __init__(self, model: nn.Module, hooks: Sequence[UnitHook], taken: weakref.WeakSet[nn.Module]) -> None:
        self._hooks = hooks
        self._taken = taken
        self._model = weakref.ref(model)
        installed: list[UnitHook] = []
        try:
            for hook in hooks:
                hook.install()
                installed.append(hook)
        except ValueError as error:
            for hook in installed:
                hook.remove()
            raise InputError(
                f"module {hooks[len(installed)].unit.name!r}: FSDP takes no hook for it: {error}; shard all parameters "
                "of a module over one mesh"
            ) from error
        taken.add(model)

    @property
    def stats(self) -> Stats:
        """Bytes and times of all units of this rank so far; a new object each time."""
        return Stats.total([hook.stats for hook in self._hooks])

    @property
    def modules(self) -> Sequence[str]:
        """The names of the modules whose gradients are compressed, each with those inside of it that are not named."""
        return [hook.unit.name for hook in self._hooks]

    def rescale(self, factor: float) -> None:
        """Multiply the error feedback by `factor`, new over old scale, when a loss scale has changed."""
        for hook in self._hooks:
            hook.residual.rescale(factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the error feedback of this rank, which has its own to save.

        Keys: ``version``; ``shard``, this rank's number in the shard mesh; ``modules``: for each module's name a dict
        of ``calls``, how many times its gradients were averaged, and ``residual``, as of `onebit.comm.Residual`.
        """
        shard = self._hooks[0].unit.shard if self._hooks else 0
        modules = {h.unit.name: {"calls": h.calls, "residual": h.residual.state_dict()} for h in self._hooks}
        return {"version": VERSION, "shard": shard, "modules": modules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of the same rank in the same mesh; before the first backward it waits until then.

        Raises:
            InputError: it is no such state, of another shard or of another model; nothing was changed.
        """
        self._check(state)
        before = [(hook, hook.calls, hook.residual.state_dict()) for hook in self._hooks]
        try:
            for hook in self._hooks:
                entry = state["modules"][hook.unit.name]
                hook.residual.load_state_dict(entry["residual"])
                hook.calls = entry["calls"]
        except InputError:
            for hook, calls, residual in before:
                hook.residual.load_state_dict(residual)
                hook.calls = calls
            raise

    def detach(self) -> None:
        """Leave the model to FSDP alone from the next backward on; its error feedback stays in `state_dict`."""
        for hook in self._hooks:
            hook.remove()
        model = self._model()
        if model is not None:
            self._taken.discard(model)

    def _check(self, state: Any) -> None:
        mine = self.state_dict()
        if not isinstance(state, Mapping) or state.keys() != mine.keys() or state["version"] != VERSION:
            raise InputError(f"not a state of {type(self).__name__} of version {VERSION}; was it made by state_dict()?")
        if state["shard"] != mine["shard"]:
            raise InputError(
                f"the state to load is of shard {state['shard']}, this rank has shard {mine['shard']}; every rank "
                "loads the state that it has saved"
            )
        if state["modules"].keys() != mine["modules"].keys():
            others = sorted(state["modules"].keys() ^ mine["modules"].keys())
            raise InputError(
                f"the state to load is of {len(state['modules'])} modules, here are {len(mine['modules'])}; "
                f"{others[0]!r} is in one of both alone; apply fully_shard to the same modules as before"
            )
        for name, entry in state["modules"].items():
            if entry.keys() != {"calls", "residual"} or type(entry["calls"]) is not int:
                raise InputError(f"the state of module {name!r} is not whole; was it made by state_dict()?")
            Residual.check(entry["residual"])
