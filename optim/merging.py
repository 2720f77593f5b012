"""Saved slices of a node's ranks: whether they can be that, and what they are when they are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.compress import InputError
from onebit.optim.state_keys import EXTRA, SHAPED, SLICES

State = Mapping[str, Any]


def slice_sizes(slices: Any, numels: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """How many elements a rank holds of each parameter.

    Args:
        slices: anything that a state has under ``"slices"``.
        numels: per group, by the parameter's number, the elements of those that have a state.

    Raises:
        InputError: it is not what `onebit.optim.sharding` saves, or is of other parameters.
    """
    whole = isinstance(slices, Mapping) and slices.keys() == {"rank", "ranks", "spans"}
    rank, ranks, spans = (slices[key] for key in ("rank", "ranks", "spans")) if whole else (None, None, None)
    if type(rank) is not int or type(ranks) is not int or not 0 <= rank < ranks or not _are_spans(spans, len(numels)):
        raise InputError(
            f"the state to load has slices that are not rank, ranks and spans of {len(numels)} groups, as a sharded "
            "optimizer saves them; it was changed, damaged, or made by something else; nothing was loaded"
        )
    sizes: dict[int, int] = {}
    for rows, known in zip(spans, numels, strict=True):
        indices = list(known)
        for tensor, offset, numel in rows.tolist():
            index = indices[tensor] if 0 <= tensor < len(indices) else None
            if index is None or offset < 0 or numel < 1 or offset + numel > known[index]:
                raise InputError(
                    f"the state to load has (tensor, offset, numel) {(tensor, offset, numel)} among its slices, which "
                    f"is no part of the {len(indices)} parameters with a state; nothing was loaded"
                )
            sizes[index] = sizes.get(index, 0) + numel
    return sizes


def merged(states: Sequence[State], shapes: Mapping[int, torch.Size]) -> list[State]:
    """The states of all ranks as they would be if every rank held everything.

    Args:
        states: ``state_dict()`` of every rank, all with slices or none; each can be loaded by the rank that saved it.
        shapes: of the parameters, by their numbers.

    Returns:
        The states themselves if they are whole; else new ones that share what was in slices.

    Raises:
        InputError: some are whole and some are not, or the slices of a rank are missing.
    """
    found = [state[EXTRA].get(SLICES) for state in states]
    if all(slices is None for slices in found):
        return list(states)
    held = {slices["rank"]: state for state, slices in zip(states, found, strict=True) if slices is not None}
    ranks = {slices["ranks"] for slices in found if slices is not None}
    if None in found or len(ranks) != 1 or sorted(held) != list(range(max(ranks))):
        raise InputError(
            f"the states are slices {sorted(held)} of {sorted(ranks)}, and {found.count(None)} are whole; expected "
            "those of all ranks of one save"
        )
    whole = {
        index: {key: _whole(held, index, key, shapes[index]) for key in SHAPED & entry.keys()}
        for index, entry in states[0]["state"].items()
    }
    made = []
    for state in states:
        extra = {key: value for key, value in state[EXTRA].items() if key != SLICES}
        entries = {index: {**entry, **whole[index]} for index, entry in state["state"].items()}
        made.append({**state, "state": entries, EXTRA: extra})
    return made


def _whole(held: Mapping[int, State], index: int, key: str, shape: torch.Size) -> Tensor:
    """One tensor from the slices that the ranks of a node hold of it."""
    first = held[0]["state"][index][key]
    flat = torch.zeros(shape.numel(), dtype=first.dtype, device=first.device)
    filled = 0
    for state in held.values():
        at, mine = 0, state["state"][index][key]
        for offset, numel in _runs(state, index):
            flat[offset : offset + numel] = mine[at : at + numel]
            at += numel
        filled += at
    if filled != shape.numel():
        raise InputError(
            f"the slices of {key} of parameter {index} have {filled} elements, and the parameter has {shape.numel()}; "
            "take the states of all ranks of one save"
        )
    return flat.view(shape)


def _runs(state: State, index: int) -> list[tuple[int, int]]:
    """Offset and size of what a rank holds of a parameter."""
    for group, rows in zip(state["param_groups"], state[EXTRA][SLICES]["spans"], strict=True):
        indices = [i for i in group["params"] if state["state"].get(i)]
        if index in indices:
            place = indices.index(index)
            return [(offset, numel) for tensor, offset, numel in rows.tolist() if tensor == place]
    return []


def _are_spans(spans: Any, groups: int) -> bool:
    return (
        isinstance(spans, (list, tuple))
        and len(spans) == groups
        and all(
            isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.dim() == 2 and rows.shape[1] == 3
            for rows in spans
        )
    )
