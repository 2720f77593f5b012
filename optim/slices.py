"""What one rank of a node holds of the state of a group: the slices of it that this rank updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from onebit.comm.scatter import Span
from onebit.comm.slice_rows import SliceRow
from onebit.comm.slices import Slices
from onebit.optim.moments import adam_state, masks_if_any
from onebit.optim.state_keys import COUNTS, SHAPED

State = MutableMapping[str, Any]


class GroupSlices:
    """Slices of the parameters of one group that have a state, and of what their states hold in their shape.

    In place of a tensor shaped as the parameter, ``exp_avg``, ``exp_avg_sq`` and ``master`` are then 1-D: this rank's
    slice of it. Which slice that is depends on the list of parameters, so slices move when the list grows.

    Args:
        deal: makes the slices of tensors of such sizes; not collective.
        parts: how many ranks have a slice.

    Attributes:
        params: whose slices there are, in the order of the group.
    """

    def __init__(self, deal: Callable[[Sequence[int]], Slices], parts: int) -> None:
        self._deal = deal
        self.parts = parts
        self._dealt = deal([])
        self._index: dict[Tensor, int] = {}
        self.params: list[Tensor] = []

    @property
    def dealt(self) -> Slices:
        """Those of `params`."""
        return self._dealt

    def assume(self, params: Sequence[Tensor]) -> None:
        """The states hold the slices of these parameters, as they were saved."""
        self._dealt = self._deal([p.numel() for p in params])
        self.params = list(params)
        self._index = {p: i for i, p in enumerate(params)}

    def follow(self, params: Sequence[Tensor], states: Mapping[Tensor, State]) -> None:
        """Have slices of these parameters from now on; collective inside the node where there are others.

        States that are whole, as they were loaded, are cut.

        Args:
            params: those that have a state, and those that are about to get one.
            states: of the optimizer; what they hold is replaced, once all of it has come.

        Raises:
            TransportError: a rank of the node is dead or too slow; nothing was changed.
        """
        if len(params) == len(self.params) and all(map(is_, params, self.params)):
            return
        dealt = self._deal([p.numel() for p in params])
        cut: list[tuple[State, str, Tensor]] = []
        for key in sorted(SHAPED):
            holders = {p: states[p] for p in params if key in states.get(p, {})}
            whole = self._whole({p: state[key] for p, state in holders.items() if p in self._index})
            for i, p in enumerate(params):
                if p in holders:
                    source: Tensor = whole[p] if p in whole else holders[p][key]
                    cut.append((holders[p], key, dealt.cut(i, source)))
        for state, key, piece in cut:
            state[key] = piece
        self._dealt, self.params, self._index = dealt, list(params), {p: i for i, p in enumerate(params)}

    def spans(self, params: Sequence[Tensor]) -> list[Span]:
        """Which runs this rank holds of these parameters, by their place among them."""
        place = {self._index[p]: i for i, p in enumerate(params)}
        return [(place[tensor], offset, numel) for tensor, offset, numel in self._dealt.spans if tensor in place]

    def cut(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's slices of tensors that are shaped as these parameters, in new memory."""
        return [self._dealt.cut(self._index[p], t) for p, t in zip(params, tensors, strict=True)]

    def gather(self, params: Sequence[Tensor], mine: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Write whole tensors from the slices of all ranks of the node; collective among them.

        Args:
            params: some of those that there are slices of.
            mine: this rank's slice for each.
            out: contiguous tensors shaped as the parameters, of the dtypes of `mine`.
        """
        places = [self._index[p] for p in params]
        self._dealt.gather(
            dict(zip(places, mine, strict=True)), dict(zip(places, [t.view(-1) for t in out], strict=True))
        )

    def whole(self, params: Sequence[Tensor], mine: Sequence[Tensor]) -> list[Tensor]:
        """As `gather`, to new tensors."""
        out = [torch.empty(p.shape, dtype=t.dtype, device=p.device) for p, t in zip(params, mine, strict=True)]
        self.gather(params, mine, out)
        return out

    def exchange(self, params: Sequence[Tensor], mine: Sequence[Tensor]) -> list[SliceRow]:
        """What all ranks of the node have given of tensors of some dtypes, for `write`; collective among them.

        Args:
            params, mine: as for `gather`.
        """
        return list(self._dealt.exchange({self._index[p]: t for p, t in zip(params, mine, strict=True)}))

    def write(self, rows: Sequence[SliceRow], params: Sequence[Tensor]) -> None:
        """Overwrite these parameters by what was exchanged of them."""
        flat = {self._index[p]: p.detach().view(-1) if p.is_contiguous() else p.new_empty(p.numel()) for p in params}
        for row in rows:
            row.write(flat)
        for p in params:
            if not p.is_contiguous():
                p.copy_(flat[self._index[p]].view(p.shape))

    def dead(self, params: Sequence[Tensor], states: Mapping[Tensor, State]) -> list[Tensor] | None:
        """As `onebit.optim.moments.dead_masks` of the whole variances; collective inside the node."""
        return masks_if_any(self.whole(params, [states[p]["exp_avg_sq"] == 0 for p in params]))

    def _whole(self, mine: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        return dict(zip(mine, self.whole(list(mine), list(mine.values())), strict=True))


class Draft:
    """A step of some parameters, made on this rank's slices beside what there is, and adopted once all ranks have it.

    Args:
        slices: of the group.
        params: some of those that there are slices of.
        states: of the optimizer, not changed; a parameter without one gets it here.
        kept: what the step leaves as it is, and so need not be copied.

    Attributes:
        params: slices of the parameters, to be updated.
        states: of these, to be updated.
    """

    def __init__(
        self,
        slices: GroupSlices,
        params: Sequence[Tensor],
        states: Mapping[Tensor, State],
        kept: frozenset[str] = frozenset(),
    ) -> None:
        self._slices = slices
        self._whole_params = list(params)
        self._rows: list[SliceRow] = []
        self.params = slices.cut(params, params)
        self.states: list[dict[str, Any]] = []
        for p, piece in zip(params, self.params, strict=True):
            state = states.get(p)
            if state:
                self.states.append({key: v if key in kept else v.clone() for key, v in state.items()})
            else:
                self.states.append(adam_state({piece: {}}, piece))

    def share(self) -> None:
        """Get the other slices of the parameters from the ranks of the node; collective among them."""
        self._rows = self._slices.exchange(self._whole_params, self.params)

    def adopt(self, states: MutableMapping[Tensor, Any]) -> None:
        """Make the step: parameters and states become those of the draft."""
        self._slices.write(self._rows, self._whole_params)
        for p, drafted in zip(self._whole_params, self.states, strict=True):
            state = states[p]
            for key, value in drafted.items():
                if key in COUNTS and key in state:
                    state[key].copy_(value)  # it may be a view that others know
                else:
                    state[key] = value
