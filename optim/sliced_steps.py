"""1-bit Adam's steps where every rank of a node holds and updates a slice of the state: whole steps, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce
from onebit.optim.adam_steps import dense_step, move, take_in
from onebit.optim.dense import MeanExchange
from onebit.optim.exchange import GroupReducers
from onebit.optim.known import Known
from onebit.optim.moments import local_momenta
from onebit.optim.packed import PackedMomentum
from onebit.optim.slices import Draft, GroupSlices
from onebit.optim.staged import CompressedExchange
from onebit.optim.state_keys import MOMENTUM, VARIANCE
from onebit.optim.warmup import WarmupStep

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer
    from onebit.optim.sharding import Sharding


class SlicedDense(WarmupStep):
    """Adam's own step on gradients averaged in fp32."""

    def __init__(
        self, optimizer: Sharding, group: dict[str, Any], reducers: GroupReducers, slices: GroupSlices
    ) -> None:
        self._slices = slices
        self._draft: Draft | None = None
        slices.follow(_with_state(group, optimizer), optimizer.state)
        super().__init__(optimizer, group, reducers, parts=slices.parts)

    def draft(self) -> None:
        """Make the step beside what there is; collective inside the node."""
        params, means = self._pairs()
        if params:
            states = self._optimizer.state
            self._slices.follow(_with_state(self._group, self._optimizer, params), states)
            self._draft = Draft(self._slices, params, states)
            dense_step(self._group, self._draft.params, self._draft.states, self._slices.cut(params, means))
            self._draft.share()

    def _update(self, params: Sequence[Tensor], means: list[Tensor]) -> None:
        assert self._draft is not None
        self._draft.adopt(self._optimizer.state)


class SlicedRefresh(MeanExchange):
    """Momentum and variance from gradients averaged in fp32; see `onebit.optim.onebit_adam`."""

    _optimizer: Sharding

    def __init__(
        self, optimizer: Sharding, group: dict[str, Any], reducers: GroupReducers, slices: GroupSlices
    ) -> None:
        self._slices = slices
        self._draft: Draft | None = None
        self._late = False
        slices.follow(_with_state(group, optimizer), optimizer.state)
        super().__init__(optimizer, group, reducers)

    def draft(self) -> None:
        """Make the step beside what there is; collective inside the node."""
        group, mean, states = self._group, self._mean, self._optimizer.state
        params = _with_state(group, self._optimizer, self._pairs()[0])
        if params:
            self._late = any(VARIANCE not in states.get(p, {}) for p in params)
            self._slices.follow(params, states)
            ages = {p: group["variance_refresh"] * here for p, here in zip(group["params"], mean.present, strict=True)}
            means = dict(zip(group["params"], mean.means, strict=True))
            self._draft = Draft(self._slices, params, states)
            cut = self._slices.cut(params, [means[p] for p in params])
            take_in(group, self._draft.params, self._draft.states, cut, [ages[p] for p in params])
            move(group, self._draft.params, self._draft.states)
            self._draft.share()

    def commit(self) -> None:
        """As of `MeanExchange`."""
        optimizer = self._optimizer
        if self._draft is not None:
            self._draft.adopt(optimizer.state)
        if self._late:
            optimizer._renew(self._reducers)
        optimizer._raise_variances(self._group)


class SlicedCompressed(CompressedExchange):
    """Momentum averaged compressed over a frozen variance, by torch's operations, where there are no fused kernels.

    The momentum that a step starts from is needed whole on every rank. It is decoded from the payloads of the last
    step; only where there are none, as after warm-up, its slices are put together.

    Args:
        optimizer, group, slices: whose step it is.
        known: the parameters that there are slices of.
        gradients: this rank's own, of these.
        reduce: the average of their momenta.
        packed: where it is kept; None: in the states.
    """

    def __init__(
        self,
        optimizer: Sharding,
        group: dict[str, Any],
        slices: GroupSlices,
        known: Known,
        gradients: Sequence[Tensor | None],
        reduce: CompressedAllreduce,
        packed: PackedMomentum | None,
    ) -> None:
        self._optimizer = optimizer
        self._group = group
        self._slices = slices
        self._known = known
        self._gradients = gradients
        self._reduce = reduce
        self._packed = packed
        self._draft: Draft | None = None
        whole = [torch.empty(p.shape, device=p.device) for p in known.params]
        if packed is not None and packed.filled:
            packed.write(whole)
        else:
            slices.gather(known.params, [state[MOMENTUM] for state in known.states], whole)
        super().__init__(reduce, whole, known.indices, made_in=whole)

    def draft(self) -> None:
        """Make the step beside what there is; collective inside the node."""
        known = self._known
        if known.params:
            self._draft = Draft(self._slices, known.params, self._optimizer.state, kept=frozenset({VARIANCE}))
            for state, momentum in zip(self._draft.states, self._mean(), strict=True):
                state[MOMENTUM] = momentum
            move(self._group, self._draft.params, self._draft.states)
            self._draft.share()

    def commit(self) -> None:
        """As of `CompressedExchange`."""
        if self._draft is not None:
            self._draft.adopt(self._optimizer.state)
        if self._packed is not None:
            self._packed.keep()
            for state in self._known.states:
                del state[MOMENTUM]
        self._accept()

    def _local_momenta(self, indices: Sequence[int]) -> list[Tensor]:
        coupled = not self._group["adamw_mode"] and self._group["weight_decay"]
        values = [self._known.params[i].float() for i in indices] if coupled else []
        momenta = [self._local[i] for i in indices]
        return local_momenta(momenta, [self._gradients[i] for i in indices], values, self._group)

    def _mean(self) -> list[Tensor]:
        """This rank's slices of the averaged momentum."""
        operators = self._reduce.codec.unchecked(self._local[0].device)
        if self._packed is not None:
            return self._slices.dealt.decode(operators, self._reduce.parts)
        for part in self._reduce.parts:  # with one node, which sums plainly, what has come is no payload
            part.decode(operators, self._local)
        return self._slices.cut(self._known.params, self._local)


def _with_state(group: dict[str, Any], optimizer: CompressedOptimizer, others: Sequence[Tensor] = ()) -> list[Tensor]:
    """The parameters of a group that have a state, and these others of it, in the order of the group."""
    wanted = set(others)
    return [p for p in group["params"] if p in wanted or VARIANCE in optimizer.state.get(p, {})]
