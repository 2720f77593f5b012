"""The tables of the documentation come from JSON files, newest first, and replace only what is marked."""

from __future__ import annotations

from pathlib import Path

from onebit.benchmarks import record, report
from onebit.benchmarks.record import Document

ROOT = Path(__file__).resolve().parents[2]
PAGE = """# Title

before
<!-- results: tiny -->
an old table
<!-- end -->
between
<!-- results: never-measured -->
kept
<!-- end -->
after
"""


def written(document: Document, folder: Path) -> str:
    """The page after a report on `document`."""
    record.save(document, folder / "results")
    page = folder / "page.md"
    page.write_text(PAGE)
    assert report.main([f"--results={folder / 'results'}", f"--page={page}"]) == 0
    return page.read_text()


def test_a_marked_section_becomes_a_table(document: Document, tmp_path: Path) -> None:
    page = written(document, tmp_path)
    assert "an old table" not in page
    header, rule, *rows = [line for line in page.splitlines() if line.startswith("|")]
    assert header.startswith("| case | tensor |")
    assert header.endswith("#wrong |")
    assert len(rows) == len(document["rows"])
    assert {line.count("|") for line in [header, rule, *rows]} == {header.count("|")}
    assert "| `encode` | 4 Ki float32 |" in page


def test_what_is_not_marked_or_not_measured_stays(document: Document, tmp_path: Path) -> None:
    page = written(document, tmp_path)
    assert page.startswith("# Title\n\nbefore\n")
    assert page.endswith("between\n<!-- results: never-measured -->\nkept\n<!-- end -->\nafter\n")


def test_a_second_report_changes_nothing(document: Document, tmp_path: Path) -> None:
    once = written(document, tmp_path)
    report.main([f"--results={tmp_path / 'results'}", f"--page={tmp_path / 'page.md'}"])
    assert (tmp_path / "page.md").read_text() == once


def test_the_newest_result_of_a_machine_is_taken(document: Document, tmp_path: Path) -> None:
    record.save({**document, "created": "2001-01-01T00:00:00+00:00", "rows": []}, tmp_path / "results")
    page = written(document, tmp_path)
    assert "2001-01-01" not in page
    assert "`decode`" in page


def test_the_documentation_holds_the_tables_of_the_results_that_stand_beside_the_code() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert report.fill(page, report.newest(ROOT / "benchmarks" / "results")) == page, "run onebit.benchmarks.report"


def test_first_calls_have_a_table_of_their_own(document: Document, tmp_path: Path) -> None:
    rows = [{"cache": state, "seconds": {"encode": 1.25, "encode again": 0.001}} for state in ("empty", "warm")]
    run = {"ranks": 1, "backend": "single", "link": "this machine", "repeats": 3, "priority": "real-time"}
    page = written({**document, "run": run, "rows": rows}, tmp_path)
    assert "| compile cache | encode, s |" in page
    assert "| warm | 1.25 |" in page
    assert "priority: real-time" in page


def test_what_was_sent_is_shown_where_no_formula_says_it(document: Document, tmp_path: Path) -> None:
    rows = [{**row, "wire_formula": 0} for row in document["rows"] if row["case"] == "compressed"]
    page = written({**document, "rows": rows}, tmp_path)
    assert "| wire bytes, formula | counted |" in page
    assert f"| - | {rows[0]['wire_bytes']:,} |" in page
