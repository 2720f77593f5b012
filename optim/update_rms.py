"""How far 1-bit Adam moves parameters: the root mean square of its update, before the learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebit.comm import Part
from onebit.compress.codec import Operators
from onebit.optim.exchange import GroupReducers
from onebit.optim.known import Known
from onebit.optim.metrics import Metrics
from onebit.optim.moments import corrections
from onebit.optim.slices import GroupSlices
from onebit.optim.state_keys import MOMENTUM, VARIANCE

if TYPE_CHECKING:
    from onebit.optim.sharding import Sharding

Piece = tuple[int, Tensor, Tensor]
"""The place of a parameter among those with a variance, and as many elements of its momentum and of its variance."""


def update_sizes(optimizer: Sharding) -> Metrics:
    """Return what `OnebitAdam.metrics` documents; empty: no parameter has a variance."""
    squares: list[Tensor] = []
    numels: list[int] = []
    for group, reducers in zip(optimizer.param_groups, optimizer._of_groups(), strict=True):
        known = optimizer._known(group)
        factors = [corrections(state, group) for state in known.states]
        sums = [torch.zeros((), device=p.device) for p in known.params]
        for place, momentum, variance in _pieces(optimizer, reducers, known):
            rate, root = factors[place]
            update = momentum * rate / (variance.sqrt() / root + group["eps"])
            sums[place] += update.square().sum()
        squares += sums
        numels += [state[VARIANCE].numel() for state in known.states]
    totals = [float(total) for total in squares]  # waits for the device, and then no more
    means = [total / numel for total, numel in zip(totals, numels, strict=True) if numel]
    if not means:
        return {}
    whole = sum(totals) / sum(numels)
    return {"update_rms": whole**0.5, "largest_update_rms": max(means) ** 0.5}


def _pieces(optimizer: Sharding, reducers: GroupReducers, known: Known) -> Iterator[Piece]:
    """The moments that this rank holds of a group, bucket by bucket where the momentum is kept as payloads."""
    fused, packed = optimizer._fused.get(reducers), optimizer._packed.get(reducers)
    kept = fused.parts if fused is not None and fused.averaged else packed.parts if packed and packed.filled else None
    if kept is None:
        yield from ((i, state[MOMENTUM], state[VARIANCE]) for i, state in enumerate(known.states))
    elif kept:
        operators = optimizer._codec.unchecked(kept[0].gathered.device)
        yield from _of_parts(kept, operators, optimizer._slices_of(reducers), known.states)


def _of_parts(
    parts: Sequence[Part], operators: Operators, slices: GroupSlices | None, states: Sequence[Mapping[str, Any]]
) -> Iterator[Piece]:
    variances = {i: state[VARIANCE].view(-1) for i, state in enumerate(states)}
    if slices is None:
        found = [(part, part.used, [variances[i] for i in part.used]) for part in parts]
    else:
        dealt = slices.dealt
        places = [tuple(tensor for tensor, _, _ in runs) for runs in dealt.runs]
        found = list(zip(dealt.own(parts), places, dealt.pieces(variances), strict=True))
    for part, places_of, flat in found:
        momentum = part.received(operators)
        for s in part.layout.segments:
            piece = momentum[part.layout.residual_span(s)]
            yield places_of[s.tensor], piece, flat[s.tensor][s.offset : s.offset + s.numel]
