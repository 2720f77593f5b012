"""Optimizers whose state may be dealt to the ranks of a node, each of which holds and updates its slice alone.

This is stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) inside a node, on the slices that averages on two
levels deal: the rank that holds the error feedback of an element holds its variance too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce, Stats, agree
from onebit.comm.levels import AUTO, Levels, LocalGroup, local_group_fact
from onebit.comm.slices import Slices
from onebit.compress import InputError
from onebit.compress.launch_env import local_rank, local_world_size, world_size_hint
from onebit.optim.exchange import Exchange, GroupReducers
from onebit.optim.freezing import Freezing
from onebit.optim.fused_slices import SlicedMomentum
from onebit.optim.merging import describe_slices, with_more_groups
from onebit.optim.options import check_flags
from onebit.optim.packed import PackedMomentum
from onebit.optim.sliced_steps import SlicedCompressed
from onebit.optim.slices import GroupSlices
from onebit.optim.state_keys import EXTRA, MOMENTUM, SLICES


class Sharding(Freezing):
    """Base of optimizers with the option `shard`; their groups have ``adamw_mode``."""

    def __init__(self, params: Any, defaults: dict[str, Any], *, shard: bool = False, **options: Any) -> None:
        name = type(self).__name__
        check_flags(name, {"shard": shard}, "shard")
        if shard:
            _refuse_one_level(name, options.get("local_group"))
        self._shard = shard
        self._sliced: WeakKeyDictionary[GroupReducers, GroupSlices] = WeakKeyDictionary()
        self._packed: WeakKeyDictionary[GroupReducers, PackedMomentum] = WeakKeyDictionary()
        self._loaded: Mapping[str, Any] | None = None
        super().__init__(params, defaults, **options)
        if shard and self._codec.block_size is None:
            raise InputError(f"{name}: shard=True needs a codec with blocks, got {self._codec}; give it a block_size")

    def state_dict(self) -> dict[str, Any]:
        """As of `CompressedOptimizer`; where the state is in slices it is this rank's, with what tells which they are.

        `onebit.optim.checkpoint` and `onebit.optim.sharded` put slices together where others are needed.
        """
        state = super().state_dict()
        held = [self._sliced.get(reducers) for reducers in self._of_groups()]
        if self._loaded is not None:
            state[EXTRA][SLICES] = with_more_groups(self._loaded, len(self.param_groups))
        elif self._levels is not None and any(slices is not None and slices.params for slices in held):
            inside, spans = self._levels.inside, []
            for group, reducers, saved in zip(self.param_groups, self._of_groups(), state["param_groups"], strict=True):
                numbers, slices = dict(zip(group["params"], saved["params"], strict=True)), self._sliced.get(reducers)
                for p, momentum in self._momenta(reducers).items():
                    state["state"][numbers[p]] = {**state["state"][numbers[p]], MOMENTUM: momentum}
                spans.append([] if slices is None else slices.spans(self._with_state(group)))
            with_state = [self._with_state(group) for group in self.param_groups]
            state[EXTRA][SLICES] = describe_slices(inside.rank, inside.size, with_state, spans)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded = state_dict[EXTRA].get(SLICES) if EXTRA in state_dict else None

    def _check_options(self, group: Mapping[str, Any]) -> None:
        super()._check_options(group)
        if self._shard and group["master_weights"] and group["weight_decay"] and not group["adamw_mode"]:
            raise InputError(
                f"{type(self).__name__}: shard=True with adamw_mode=False, weight_decay={group['weight_decay']!r} and "
                "master_weights=True: weight decay in the gradient reads masters that no rank has whole; use "
                "adamw_mode=True, or leave master_weights out"
            )

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "shard": self._shard}

    def _settle_slices(self) -> None:
        if not self._shard:
            return
        backend, subject = self.backend, f"{type(self).__name__}(shard=True)"
        if self._nodes() is None and backend.size > 1:  # on every rank
            raise _one_level(f"rank {backend.rank}: {type(self).__name__}", self._local_group)
        refusal = None if self._loaded is None else self._misfit(self._loaded)
        agree(backend, subject, {"slices to go on with": str(self._loaded is not None)}, refusal)
        for group, reducers in zip(self.param_groups, self._of_groups(), strict=True):
            slices, params = self._slices_of(reducers), self._with_state(group)
            if slices is not None and self._loaded is not None:
                slices.assume(params)
            elif slices is not None:
                slices.follow(params, self.state)
        self._loaded = None

    def _takes(self, state: Mapping[str, Any]) -> bool:
        loaded = state.get(EXTRA, {}).get(SLICES)
        return super()._takes(state) and (loaded is None or self._holds(loaded))

    def _misfit(self, loaded: Mapping[str, Any]) -> InputError | None:
        """Why slices that were loaded cannot be gone on with; None: they can."""
        if self._holds(loaded):
            return None
        return InputError(
            f"rank {self.backend.rank}: the state that was loaded holds slice {loaded['rank']} of {loaded['ranks']}, "
            "as local_group and bucket_mb made them then, and this rank would hold others; "
            "onebit.optim.checkpoint.load and onebit.optim.sharded.load take the slices of all ranks and cut them anew"
        )

    def _holds(self, saved: Mapping[str, Any]) -> bool:
        """Whether these are the slices that this rank has of tensors of such shapes."""
        levels = self._nodes()
        if levels is None or (saved["rank"], saved["ranks"]) != (levels.inside.rank, levels.inside.size):
            return False
        numels = [[torch.Size(shape).numel() for shape in shapes] for shapes in saved["shapes"]]
        deal = self._dealer(levels)
        pairs = zip(numels, saved["spans"], strict=True)
        return all(deal(sizes).spans == [tuple(row) for row in rows.tolist()] for sizes, rows in pairs)

    def _dealer(self, levels: Levels, stats: Stats | None = None) -> Callable[[Sequence[int]], Slices]:
        """What makes slices of tensors of such sizes, as averages are made of them."""
        return partial(Slices, codec=self._codec, bucket_mb=self._bucket_size(), levels=levels, stats=stats)

    def _with_state(self, group: Mapping[str, Any]) -> list[Tensor]:
        return [p for p in group["params"] if self.state.get(p)]

    def _slices_of(self, reducers: GroupReducers) -> GroupSlices | None:
        """What this rank holds of a group; None: everything, as there is one rank, or without `shard`."""
        levels = self._levels if self._shard else None
        if levels is None:
            return None
        if reducers not in self._sliced:
            stats = Stats()
            reducers.count(stats)
            self._sliced[reducers] = GroupSlices(self._dealer(levels, stats), levels.inside.size)
        return self._sliced[reducers]

    def _sliced_step(self, group: dict[str, Any], reducers: GroupReducers, slices: GroupSlices) -> Exchange:
        """1-bit Adam's compressed step on slices, by fused kernels where there are any."""
        known = self._known(group)
        slices.follow(known.params, self.state)
        gradients = self._known_gradients(group, reducers, known)
        reduce = self._average_of(reducers, known.like, lambda: slices.dead(known.params, self.state))
        fused = self._fused.get(reducers)
        if fused is None:
            kernels = self._step_kernels(known.params[0].device) if reduce.parts else None
            if kernels is None:
                packed = self._packed_momentum(reducers, reduce)
                return SlicedCompressed(self, group, slices, known, gradients, reduce, packed)
            fused = self._fused[reducers] = SlicedMomentum(kernels, reduce, slices)
        return fused.exchange(group, known, gradients)

    def _packed_momentum(self, reducers: GroupReducers, reduce: CompressedAllreduce) -> PackedMomentum | None:
        """Where a group's averaged momentum is kept; None: in the states, for with one node it comes in fp32."""
        if reduce.levels is None or not reduce.levels.compresses:
            return None
        if reducers not in self._packed:
            self._packed[reducers] = PackedMomentum(reduce)
        return self._packed[reducers]

    def _unfuse(self, group: Mapping[str, Any], reducers: GroupReducers) -> None:
        super()._unfuse(group, reducers)
        for p, momentum in self._momenta(reducers).items():
            self.state[p][MOMENTUM] = momentum
        self._packed.pop(reducers, None)

    def _renew(self, reducers: GroupReducers) -> None:
        super()._renew(reducers)
        self._packed.pop(reducers, None)

    def _momenta(self, reducers: GroupReducers) -> dict[Tensor, Tensor]:
        """This rank's slices of the momenta that are kept as payloads."""
        packed = self._packed.get(reducers)
        if packed is None or not packed.filled:
            return {}
        slices = self._sliced[reducers]
        return dict(zip(slices.params, packed.slices(slices.dealt), strict=True))


def _refuse_one_level(owner: str, local_group: LocalGroup) -> None:
    """Raise InputError where it is plain that no two ranks are one node."""
    alone = local_group == AUTO and local_rank() is not None and local_world_size() == 1 and world_size_hint() > 1
    if local_group is None or alone or 1 in (local_group, getattr(local_group, "size", None)):
        raise _one_level(owner, local_group)


def _one_level(who: str, local_group: LocalGroup) -> InputError:
    return InputError(
        f"{who}: shard=True deals a node's state to its ranks, and local_group={local_group_fact(local_group)} makes "
        "every rank a node of its own, which uses all of its variance and its momentum in every step; give the number "
        "of ranks of a node as local_group, or leave shard out"
    )
