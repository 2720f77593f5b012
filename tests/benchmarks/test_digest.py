"""Of a long table a reader is shown what was checked and compared: where a case breaks even, its ends, and extremes."""

from __future__ import annotations

from typing import Any

import pytest

from onebit.benchmarks.digest import LONG, digest

Row = dict[str, Any]


def row(case: str, numel: int = 1, ratio: float | None = None, wrong: int | None = 0, dtype: str = "float32") -> Row:
    ratios = {} if ratio is None else {"plain": {"median": ratio}, "another": {"median": 9.0}}
    return {"case": case, "numel": numel, "dtype": dtype, "ratios": ratios, "wrong": wrong}


def shown(rows: list[Row]) -> list[Row]:
    """What a table of these rows shows, made long by rows that nobody needs."""
    padded = rows + [row(f"stage-{index}") for index in range(LONG)]
    return [padded[index] for index in digest(padded)]


def test_a_table_that_is_not_long_is_shown_as_it_is() -> None:
    assert digest([row("encode")] * LONG) == list(range(LONG))
    assert digest([row("encode")] * (LONG + 1)) == []


@pytest.mark.parametrize(
    ("ratios", "kept"),
    [
        ([0.3, 0.8, 1.2, 1.9, 2.5], [0, 2, 4]),
        ([0.3, 1.2, 0.8, 1.9, 2.5], [0, 3, 4]),  # from there on it is never slower again
        ([0.3, 0.4, 0.5, 0.6, 0.7], [0, 4]),
        ([1.0, 1.1, 1.2, 1.3, 1.4], [0, 4]),
    ],
)
def test_a_sweep_has_its_ends_and_its_break_even(ratios: list[float], kept: list[int]) -> None:
    sweep = [row("compressed", 1 << index, ratio) for index, ratio in enumerate(ratios)]
    assert shown(sweep) == [sweep[index] for index in kept]
    assert shown(sweep[::-1]) == [sweep[index] for index in kept[::-1]]


def test_sweeps_of_two_cases_or_dtypes_are_two() -> None:
    rows = [row(case, size, 2.0, dtype=dtype) for case in "ab" for dtype in ("float32", "bfloat16") for size in (1, 2)]
    assert shown(rows) == rows


def test_of_variants_at_one_size_the_fastest_and_the_slowest_are_shown() -> None:
    names = ("encode int8", "encode int4", "encode fp8", "encode, again")
    variants = [row(name, 64, ratio) for name, ratio in zip(names, (0.9, 1.1, 0.5, 0.7), strict=True)]
    others = [row("encode int8", 32, 0.6, dtype="bfloat16"), row("decode int8", 64, 0.8)]
    assert shown(variants + others) == [variants[1], variants[2], *others]


def test_what_was_not_checked_or_not_compared_is_left_to_the_whole_table() -> None:
    assert shown([row("copy"), row("theirs", ratio=0.5, wrong=None)]) == []
