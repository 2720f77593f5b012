"""Parameters that change their group: a group that has made steps without them gives them up to a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

_LISTS = ("params", "param_names")  # one entry per parameter; names are there if they were given


def take_out(
    groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Any], wanted: Iterable[Any]
) -> dict[int, dict[str, list[Any]]]:
    """Take those parameters out of their groups that these have made steps without.

    Args:
        groups: of an optimizer; their lists are changed in place.
        states: of the optimizer.
        wanted: tensors, or pairs of a name and a tensor; some may be in none of the groups.

    Returns:
        By the index of each group that has lost some, the lists that it had, for `put_back`.
    """
    asked = {id(item[1] if isinstance(item, tuple) else item) for item in wanted}
    before: dict[int, dict[str, list[Any]]] = {}
    for index, group in enumerate(groups):
        stays = [not (group["step"] and id(p) in asked and not states.get(p)) for p in group["params"]]
        if not all(stays):
            before[index] = {name: list(group[name]) for name in _LISTS if name in group}
            for name, items in before[index].items():
                group[name][:] = [item for item, stay in zip(items, stays, strict=True) if stay]
    return before


def put_back(groups: Sequence[dict[str, Any]], before: Mapping[int, Mapping[str, list[Any]]]) -> None:
    """Undo `take_out`."""
    for index, lists in before.items():
        for name, items in lists.items():
            groups[index][name][:] = items
