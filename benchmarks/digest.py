"""Which rows of a long table a reader needs; the others stand in the whole table, folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LONG = 30  # more rows than these are not read

Row = Mapping[str, Any]


def digest(rows: Sequence[Row]) -> list[int]:
    """Indices of the rows to show, ascending: all of a table that is not long.

    Of a long one: only what was checked and has a ratio, so neither yardsticks nor stages. A case that was measured at
    several sizes has its smallest, its largest and the one from which on it breaks even. Of cases that begin with the
    same word, and were measured at one size each, the fastest and the slowest are shown for each tensor.
    """
    if len(rows) <= LONG:
        return list(range(len(rows)))
    cases: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        if row["ratios"] and row["wrong"] is not None:
            cases.setdefault((row["case"], row["dtype"]), []).append(index)
    chosen: set[int] = set()
    variants: dict[tuple[str, str, int], list[int]] = {}
    for (case, dtype), found in cases.items():
        if len({rows[index]["numel"] for index in found}) > 1:
            chosen |= _ends_and_break_even(rows, found)
        else:
            family = case.split()[0].partition(",")[0]
            variants.setdefault((family, dtype, rows[found[0]]["numel"]), []).extend(found)
    for found in variants.values():
        chosen |= {max(found, key=lambda index: _ratio(rows[index])), min(found, key=lambda index: _ratio(rows[index]))}
    return sorted(chosen)


def _ends_and_break_even(rows: Sequence[Row], found: Sequence[int]) -> set[int]:
    """The smallest and the largest size, and the smallest from which on a case is never slower than its yardstick."""
    sizes = sorted(found, key=lambda index: int(rows[index]["numel"]))
    even = len(sizes)
    while even and _ratio(rows[sizes[even - 1]]) >= 1.0:
        even -= 1
    return {sizes[0], sizes[-1], *sizes[even : even + 1]}


def _ratio(row: Row) -> float:
    """How many times as fast a row is as the first of its yardsticks."""
    return float(next(iter(row["ratios"].values()))["median"])
