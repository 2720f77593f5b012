"""Optimizers that make 1-bit Adam's compressed step among others, by fused kernels where there are any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce
from onebit.optim.base import CompressedOptimizer
from onebit.optim.exchange import Exchange, GroupReducers
from onebit.optim.floor import raise_small_variances
from onebit.optim.fused import FusedMomentum
from onebit.optim.kernels import StepKernels, step_kernels
from onebit.optim.known import Known
from onebit.optim.moments import dead_masks


class FusedGroups(CompressedOptimizer):
    """Base of optimizers whose averaged momentum may stay signs and scales between steps; see `FusedMomentum`."""

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        self._fused: WeakKeyDictionary[GroupReducers, FusedMomentum] = WeakKeyDictionary()
        self._dead: WeakKeyDictionary[GroupReducers, list[Tensor] | None] = WeakKeyDictionary()
        self._told: WeakSet[GroupReducers] = WeakSet()  # whose average knows what is dead
        self._looked_up: dict[int, Known] = {}  # by the identity of a group's list of parameters
        super().__init__(params, defaults, **options)

    @property
    def kernels(self) -> str:
        """What makes compressed steps: ``"cpu"`` or ``"gpu"``, fused kernels; or ``"torch"``, its operations.

        Fused kernels are for a `SignCodec`, on more than one rank, with `local_group` on more than one node (how many
        there are is known after the first step). Between their steps the momentum is kept as it was sent, so
        ``state_dict()`` has ``exp_avg`` but ``state`` does not.
        """
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        fused = self._step_kernels(device) if self.backend.size > 1 else None
        return "torch" if fused is None else fused.name

    def state_dict(self) -> dict[str, Any]:
        packed: dict[str, Any] = super().state_dict()
        for group, reducers, saved in zip(self.param_groups, self._of_groups(), packed["param_groups"], strict=True):
            if reducers in self._fused:
                known = [(i, p) for i, p in zip(saved["params"], group["params"], strict=True) if i in packed["state"]]
                states = [packed["state"][i] for i, _ in known]
                whole = self._fused[reducers].unfused([p for _, p in known], states)
                packed["state"].update(zip([i for i, _ in known], whole, strict=True))
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._looked_up.clear()  # it holds the states that there were
        for state in self.state.values():
            if "step" in state:  # where Adam or AdamW made it, every step updated the variance
                state.setdefault("variance_step", state["step"].clone())

    def _regrouped(self, index: int) -> None:
        group, reducers = self.param_groups[index], self._of_groups()[index]
        self._unfuse(group, reducers)
        self._fused.pop(reducers, None)  # it may know the places that parameters had in the group

    def _count_made(self, group: dict[str, Any]) -> None:
        made_by = self._looked_up.get(id(group["params"])) or self._known(group)
        made_by.count()

    def _known(self, group: Mapping[str, Any]) -> Known:
        """The parameters of a group that have a variance, and their states."""
        params = group["params"]
        known = self._looked_up.get(id(params))
        if known is None or not known.still(params, self.state):
            known = self._looked_up[id(params)] = Known(params, self.state)
        return known

    def _dead_of(self, reducers: GroupReducers, variances: Sequence[Tensor]) -> list[Tensor] | None:
        """Masks of the entries whose variance is 0, remembered until `_forget_dead`, and told to the average."""
        if reducers not in self._dead:
            self._dead[reducers] = dead_masks(variances)
            reducers.remask(self._dead[reducers])
            self._told.add(reducers)
        return self._dead[reducers]

    def _raise_variances(self, group: Mapping[str, Any]) -> None:
        """Put the floor under a group's variances if its next step, which does not update them, averages compressed."""
        if self.backend.size > 1 and not self._averages(group):
            states = [self.state[p] for p in group["params"] if p in self.state]
            variances = [state["exp_avg_sq"] for state in states if "exp_avg_sq" in state]
            raise_small_variances(variances, group["variance_floor"], self._codec.block_size)

    def _forget_dead(self, reducers: GroupReducers) -> None:
        """The variance is about to change."""
        self._dead.pop(reducers, None)
        self._told.discard(reducers)

    def _renew(self, reducers: GroupReducers) -> None:
        """The list of parameters that have a variance is about to change."""
        self._fused.pop(reducers, None)
        reducers.renew()

    def _known_gradients(
        self, group: Mapping[str, Any], reducers: GroupReducers, known: Known
    ) -> Sequence[Tensor | None]:
        """This rank's gradients of the parameters that have a variance; of others it says what is to be said."""
        gradients = self._gradients(group)
        if self._leaves_others(group):
            known.warn_of_others(gradients, reducers)
        return known.of(gradients)

    def _look_at_others(
        self, group: Mapping[str, Any], reducers: GroupReducers, gradients: Sequence[Tensor | None]
    ) -> None:
        if self._leaves_others(group):
            self._known(group).warn_of_others(gradients, reducers)

    def _leaves_others(self, group: Mapping[str, Any]) -> bool:
        """Whether a parameter of the group without a variance gets none by a step that is sure to come."""
        return True

    def _unfuse(self, group: Mapping[str, Any], reducers: GroupReducers) -> None:
        """Have the momentum in the states, in fp32; the next fused step starts from there."""
        fused = self._fused.get(reducers)
        if fused is not None and fused.averaged:
            known = self._known(group)
            fused.release(known.params, known.states)

    def _average_of(
        self, reducers: GroupReducers, like: Sequence[Tensor], dead: Callable[[], list[Tensor] | None] | None = None
    ) -> CompressedAllreduce:
        """The compressed average of tensors such as `like`, without what is dead; it keeps a bit of each entry.

        Args:
            like: the variances; or, if `dead` is given, tensors of their shapes.
            dead: tells the masks of `dead_masks`; None: that of `like`.
        """
        masks = partial(dead_masks, like) if dead is None else dead
        reduce = reducers.compressed(like, masks)
        if reducers not in self._told:
            reducers.remask(masks())
            self._told.add(reducers)
        return reduce

    def _step_kernels(self, device: torch.device) -> StepKernels | None:
        """The fused kernels of compressed steps; none where all ranks are one node, for its mean is no payload."""
        one_node = self._levels is not None and not self._levels.compresses
        return None if one_node else step_kernels(device, self._codec)

    def _fused_step(
        self, group: Mapping[str, Any], reducers: GroupReducers, known: Known, gradients: Sequence[Tensor | None]
    ) -> Exchange | None:
        """1-bit Adam's compressed step by fused kernels; None: there are none, or nothing to average.

        Args:
            known: what `_known` gives.
            gradients: of these parameters.
        """
        momentum = self._fused_momentum(reducers, known)
        return None if momentum is None else momentum.exchange(group, known, gradients)

    def _fused_momentum(self, reducers: GroupReducers, known: Known) -> FusedMomentum | None:
        """What makes fused steps of parameters that have a variance; None: no kernels, or nothing to average."""
        reduce = self._average_of(reducers, [s["exp_avg_sq"] for s in known.states])
        fused = self._fused.get(reducers)
        if fused is None:
            kernels = self._step_kernels(known.params[0].device) if reduce.parts else None
            if kernels is None:
                return None
            fused = self._fused[reducers] = FusedMomentum(kernels, reduce)
        return fused
