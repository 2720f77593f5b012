"""The tables of docs/reliability/evidence.md are those of the newest results, row by row, and say what went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onebit.benchmarks import record
from tests.faults.report import PAGE, fill, newest

ROOT = Path(__file__).resolve().parents[2]
MARKED = "before\n<!-- campaign: soak -->\nold\n<!-- end -->\nafter\n<!-- campaign: strikes -->\nkept\n<!-- end -->\n"


def soaked(created: str, said: tuple[str, ...] = (), **steps: int) -> record.Document:
    rows: list[dict[str, Any]] = [
        {
            "campaign": "soak",
            "backend": "gloo",
            "optimizer": optimizer,
            "ranks": 4,
            "steps": count,
            "memory_growth": 1 << 20,
            "feedback_growth": 1.01,
            "wrong": len(said),
            "said": list(said),
        }
        for optimizer, count in steps.items()
    ]
    return {"kind": "cpu-7core", "created": created, "rows": rows}


def test_of_each_kind_of_row_the_newest_counts() -> None:
    found = newest([soaked("2026-02", Lamb=20_000), soaked("2026-01", Lamb=5, Adam=700)], "soak")
    assert [(row["optimizer"], row["steps"]) for _, row in found] == [("Adam", 700), ("Lamb", 20_000)]


def test_what_is_marked_is_replaced_and_what_was_not_made_stays() -> None:
    page = fill(MARKED, [soaked("2026-02", ("it leaks",), Lamb=20_000)])
    assert "old" not in page
    assert "| `Lamb` | 4 | 20,000 | 1,024 |" in page
    assert "- wrong: it leaks\n" in page
    assert page.startswith("before\n<!-- campaign: soak -->\n")
    assert page.endswith("<!-- end -->\nafter\n<!-- campaign: strikes -->\nkept\n<!-- end -->\n")
    assert fill(page, [soaked("2026-02", ("it leaks",), Lamb=20_000)]) == page


def test_the_page_is_up_to_date() -> None:
    results = [record.load(path) for path in sorted((ROOT / record.CHECKOUT).glob("*-torture*.json"))]
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert fill(page, results) == page, "run python -m tests.faults.report"
