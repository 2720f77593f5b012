"""Saved slices of a node's ranks: whether they can be that, and what they are when they are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.compress import InputError
from onebit.optim.state_keys import EXTRA, SHAPED, SLICES

State = Mapping[str, Any]


def describe_slices(rank: int, ranks: int, groups: Sequence[Sequence[Tensor]], spans: Sequence[Any]) -> dict[str, Any]:
    """What a state has under ``"slices"``.

    Args:
        rank, ranks: which slice it is, and how many there are.
        groups: per group, the parameters that have a state.
        spans: per group, the runs of these that this rank holds: tensor, first element, number of elements.
    """
    return {
        "rank": rank,
        "ranks": ranks,
        "shapes": [[list(p.shape) for p in params] for params in groups],
        "spans": [torch.tensor(rows, dtype=torch.int64).view(-1, 3) for rows in spans],
    }


def with_more_groups(slices: Mapping[str, Any], groups: int) -> dict[str, Any]:
    """What a state has under ``"slices"`` where groups without state have come to it: as many as `groups` in all."""
    nothing: list[Any] = [[] for _ in range(groups - len(slices["shapes"]))]
    none = describe_slices(slices["rank"], slices["ranks"], nothing, nothing)
    return {**slices, **{key: [*slices[key], *none[key]] for key in ("shapes", "spans")}}


def slice_sizes(slices: Any, groups: Sequence[Mapping[int, Tensor]]) -> dict[int, int]:
    """How many elements a rank holds of each parameter.

    Args:
        slices: anything that a state has under ``"slices"``.
        groups: per group, by their numbers, the parameters that have a state.

    Raises:
        InputError: it is not what `onebit.optim.sharding` saves, or is of other parameters.
    """
    keys = {"rank", "ranks", "shapes", "spans"}
    whole = isinstance(slices, Mapping) and slices.keys() == keys and _are_spans(slices["spans"], len(groups))
    rank, ranks = (slices["rank"], slices["ranks"]) if whole else (None, None)
    if type(rank) is not int or type(ranks) is not int or not 0 <= rank < ranks:
        raise InputError(
            f"the state to load has slices that are not {', '.join(sorted(keys))} of {len(groups)} groups, as "
            "shard=True saves them; it was changed, damaged, or made by something else; nothing was loaded"
        )
    sizes: dict[int, int] = {}
    for saved, rows, known in zip(slices["shapes"], slices["spans"], groups, strict=True):
        numbers, shapes = list(known), [list(p.shape) for p in known.values()]
        if saved != shapes:
            raise InputError(
                f"the state to load has slices of tensors of shapes {saved}, and the parameters with a state have "
                f"{shapes}; nothing was loaded"
            )
        for tensor, offset, numel in rows.tolist():
            number = numbers[tensor] if 0 <= tensor < len(numbers) else None
            if number is None or offset < 0 or numel < 1 or offset + numel > known[number].numel():
                raise InputError(
                    f"the state to load has (tensor, offset, numel) {(tensor, offset, numel)} among its slices, which "
                    f"is no part of the {len(numbers)} parameters with a state; nothing was loaded"
                )
            sizes[number] = sizes.get(number, 0) + numel
    return sizes


def merged(states: Sequence[State]) -> Sequence[State]:
    """The states of all ranks as they would be if every rank held everything.

    Args:
        states: ``state_dict()`` of every rank; each can be loaded by the rank that saved it.

    Returns:
        The states themselves if they are whole; else new ones that share what was in slices.

    Raises:
        InputError: some are whole and some are not, or the slices of a rank are missing.
    """
    found: list[Mapping[str, Any]] = [state[EXTRA][SLICES] for state in states if SLICES in state[EXTRA]]
    if not found:
        return states
    held = {state[EXTRA][SLICES]["rank"]: state for state in states if SLICES in state[EXTRA]}
    ranks = {slices["ranks"] for slices in found}
    if len(found) < len(states) or len(ranks) != 1 or sorted(held) != list(range(max(ranks))):
        raise InputError(
            f"the states are slices {sorted(held)} of {sorted(ranks)}, and {len(states) - len(found)} are whole; "
            "expected those of all ranks of one save"
        )
    shapes = _shapes(states[0])
    whole = {
        number: {key: _whole(held, number, key, shapes[number]) for key in SHAPED & entry.keys()}
        for number, entry in states[0]["state"].items()
    }
    made: list[State] = []
    for state in states:
        extra = {key: value for key, value in state[EXTRA].items() if key != SLICES}
        entries = {number: {**entry, **whole[number]} for number, entry in state["state"].items()}
        made.append({**state, "state": entries, EXTRA: extra})
    return made


def _whole(held: Mapping[int, State], number: int, key: str, shape: torch.Size) -> Tensor:
    """One tensor from the slices that the ranks of a node hold of it."""
    first = held[0]["state"][number][key]
    flat = torch.zeros(shape.numel(), dtype=first.dtype, device=first.device)
    filled = 0
    for state in held.values():
        at, mine = 0, state["state"][number][key]
        for offset, numel in _runs(state, number):
            flat[offset : offset + numel] = mine[at : at + numel]
            at += numel
        filled += at
    if filled != shape.numel():
        raise InputError(
            f"the slices of {key} of parameter {number} have {filled} elements, and the parameter has {shape.numel()}; "
            "take the states of all ranks of one save"
        )
    return flat.view(shape)


def _with_state(state: State) -> list[list[int]]:
    """Per group, the numbers of the parameters that have a state."""
    return [[number for number in group["params"] if state["state"].get(number)] for group in state["param_groups"]]


def _shapes(state: State) -> dict[int, torch.Size]:
    pairs = zip(_with_state(state), state[EXTRA][SLICES]["shapes"], strict=True)
    return {
        number: torch.Size(shape) for numbers, shapes in pairs for number, shape in zip(numbers, shapes, strict=True)
    }


def _runs(state: State, number: int) -> list[tuple[int, int]]:
    """Offset and size of what a rank holds of a parameter."""
    for numbers, rows in zip(_with_state(state), state[EXTRA][SLICES]["spans"], strict=True):
        if number in numbers:
            place = numbers.index(number)
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
