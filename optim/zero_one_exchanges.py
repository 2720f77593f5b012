"""The exchanges of 0/1 Adam: a step on averaged gradients, a rank's own step, and the step at which ranks meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebit.comm.tensors import all_finite
from onebit.optim.dense import MeanExchange
from onebit.optim.exchange import GroupReducers
from onebit.optim.fused_local import FusedLocal
from onebit.optim.known import Known
from onebit.optim.local_kernels import LocalStep
from onebit.optim.local_steps import KEPT, MEAN, RATE, Reach, begin, end, is_open, local_step, move, starts_of
from onebit.optim.master import fp32_values, write_back
from onebit.optim.moments import adam_state, local_momenta, wanted
from onebit.optim.staged import CompressedExchange

if TYPE_CHECKING:
    from onebit.optim.zero_one_adam import ZeroOneAdam


class VarianceExchange(MeanExchange):
    """Adam's step on gradients averaged in fp32."""

    _optimizer: ZeroOneAdam

    def commit(self) -> None:
        """As of `MeanExchange`."""
        optimizer, group = self._optimizer, self._group
        params, means = self._pairs()
        if not params:
            return
        if any("exp_avg_sq" not in optimizer.state.get(p, {}) for p in params):
            optimizer._renew(self._reducers)
        optimizer._forget_dead(self._reducers)
        states = [adam_state(optimizer.state, p) for p in params]
        values = fp32_values(params, states, group)
        gradients = wanted(means, values, group)
        momenta, variances = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(momenta, gradients, 1 - beta1)
        torch._foreach_mul_(variances, beta2)
        torch._foreach_addcmul_(variances, gradients, gradients, 1 - beta2)
        torch._foreach_add_([s["variance_step"] for s in states], 1.0)
        counts = [float(s["step"]) for s in states], [float(s["variance_step"]) for s in states]
        move(values, momenta, variances, Reach.of(states, counts, group), group["eps"])
        torch._foreach_add_([s["step"] for s in states], 1.0)
        write_back(params, values)
        optimizer._raise_variances(group)


class _OwnMomenta:
    """This rank's next momenta, β₁·m + (1-β₁)·gᵢ, and their means over the interval; 0 where an entry is dead.

    Args:
        optimizer, group, reducers: whose step it is.
        known: the parameters that have a variance.
        reach: theirs, this step included.
    """

    def __init__(
        self, optimizer: ZeroOneAdam, group: dict[str, Any], reducers: GroupReducers, known: Known, reach: Reach
    ) -> None:
        self._group = group
        self._known = known
        self._shares = reach.shares
        self._gradients = optimizer._known_gradients(group, reducers, known)
        self._dead = optimizer._dead_of(reducers, [s["exp_avg_sq"] for s in known.states])

    def of(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Both, of some of the parameters, in new tensors; the same ones twice where an interval begins."""
        within = is_open(self._known.states)
        params, states = [self._known.params[i] for i in indices], [self._known.states[i] for i in indices]
        values = [p.float() for p in params] if within else fp32_values(params, states, self._group)
        gradients = [self._gradients[i] for i in indices]
        momenta = local_momenta([s["exp_avg"] for s in states], gradients, values, self._group)
        if self._dead is not None:
            for m, i in zip(momenta, indices, strict=True):
                m.masked_fill_(self._dead[i], 0.0)
        if not within or not momenta:
            return momenta, momenta
        shares = [self._shares[i] for i in indices]
        return momenta, list(torch._foreach_lerp([s[MEAN] for s in states], momenta, shares))


class LocalExchange:
    """A step that a rank makes by itself, by torch's operations."""

    def __init__(self, optimizer: ZeroOneAdam, group: dict[str, Any], reducers: GroupReducers, known: Known) -> None:
        self._optimizer = optimizer
        self._group = group
        self._known = known
        self._params, self._states = known.params, known.states
        self._reach = Reach.of(self._states, known.counts(), group)
        own = _OwnMomenta(optimizer, group, reducers, known, self._reach)
        self._momenta, self._means = own.of(range(len(self._params)))
        self._taken = bool(all_finite(self._means))

    def all_finite(self) -> Tensor:
        """True: only this rank could say no, and the others would not hear of it."""
        return torch.ones((), dtype=torch.bool)

    def undo(self) -> None:
        """Nothing was changed."""

    def commit(self) -> None:
        """As of `Exchange`."""
        if not self._params:
            return
        group, states, reach = self._group, self._states, self._reach
        if not is_open(states):
            begin(self._params, states, group)
        if self._taken:
            for state, momentum, mean in zip(states, self._momenta, self._means, strict=True):
                state["exp_avg"] = momentum
                state[MEAN] = mean.clone() if mean is momentum else mean
        else:
            self._leave_out()
        self._optimizer._left_out.note(torch.tensor(self._taken), self._optimizer.backend.rank)
        for state, rate, kept in zip(states, reach.rates, reach.kept, strict=True):
            state[RATE], state[KEPT] = rate, kept
        variances = [s["exp_avg_sq"] for s in states]
        local_step(self._params, starts_of(states), [s[MEAN] for s in states], variances, reach, group["eps"])
        self._known.count()

    def _leave_out(self) -> None:
        """Add nothing to Σγ·m: its mean a gets smaller as Σγ grows."""
        for state, share in zip(self._states, self._reach.shares, strict=True):
            state[MEAN] = state[MEAN] * (1 - share) if MEAN in state else torch.zeros_like(state["exp_avg"])


class FusedLocalExchange:
    """A step that a rank makes by itself, in one pass over memory."""

    def __init__(
        self,
        kernel: type[LocalStep],
        optimizer: ZeroOneAdam,
        group: dict[str, Any],
        reducers: GroupReducers,
        known: Known,
    ) -> None:
        self._kernel = kernel
        self._optimizer = optimizer
        self._group = group
        self._reducers = reducers
        self._known = known
        self._gradients = optimizer._known_gradients(group, reducers, known)

    def all_finite(self) -> Tensor:
        """True, as of `LocalExchange`."""
        return torch.ones((), dtype=torch.bool)

    def undo(self) -> None:
        """Nothing was changed."""

    def commit(self) -> None:
        """As of `Exchange`."""
        kept = self._optimizer._locals
        if self._reducers not in kept:
            kept[self._reducers] = FusedLocal(self._kernel, self._known.params)
        taken = kept[self._reducers].step(self._known, self._gradients, self._group)
        self._optimizer._left_out.note(taken, self._optimizer.backend.rank)


class SyncExchange(CompressedExchange):
    """A local step, unless `steps` is 0, at whose end all ranks agree on the mean momentum of the interval."""

    def __init__(
        self, optimizer: ZeroOneAdam, group: dict[str, Any], reducers: GroupReducers, known: Known, *, steps: int = 1
    ) -> None:
        self._group = group
        self._steps = steps
        self._params, self._states = known.params, known.states
        self._reach = Reach.of(self._states, known.counts(), group, steps=steps)
        self._own = _OwnMomenta(optimizer, group, reducers, known, self._reach) if steps else None
        variances = [s["exp_avg_sq"] for s in self._states]
        dead = optimizer._dead_of(reducers, variances)
        super().__init__(reducers.compressed(variances, lambda: dead), variances, known.indices)

    def commit(self) -> None:
        """As of `CompressedExchange`."""
        if not self._params:
            return
        group, states = self._group, self._states
        momenta = [s["exp_avg"] for s in states]
        self._decode(momenta)
        starts = starts_of(states) if is_open(states) else fp32_values(self._params, states, group)
        move(starts, momenta, [s["exp_avg_sq"] for s in states], self._reach, group["eps"])
        write_back(self._params, starts)
        torch._foreach_add_([s["step"] for s in states], float(self._steps))
        end(states)

    def _local_momenta(self, indices: Sequence[int]) -> list[Tensor]:
        return [self._states[i][MEAN] for i in indices] if self._own is None else self._own.of(indices)[1]
