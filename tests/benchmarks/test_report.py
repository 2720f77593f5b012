"""The tables of the documentation come from JSON files, the newest of each, and replace only what is marked."""

from __future__ import annotations

import re
from pathlib import Path

from onebit.benchmarks import record, report
from onebit.benchmarks.digest import LONG
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
    found = report.newest(ROOT / "benchmarks" / "results")
    texts = {page: page.read_text(encoding="utf-8") for page in report.pages(ROOT / "docs" / "benchmarks.md")}
    assert len(texts) > 1
    links = report.places({page.relative_to(ROOT / "docs").as_posix(): text for page, text in texts.items()})
    for page, text in texts.items():
        assert report.fill(text, found, links) == text, f"{page.name}: run onebit.benchmarks.report"


def test_pictures_stand_beside_the_page_that_shows_them_and_none_is_left_over() -> None:
    for page in report.pages(ROOT / "docs" / "benchmarks.md"):
        shown = re.findall(r"^!\[.+\]\((.+)\)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert [name for name in shown if not (page.parent / name).is_file()] == []
    texts = "".join(page.read_text(encoding="utf-8") for page in report.pages(ROOT / "docs" / "benchmarks.md"))
    assert [path.name for path in (ROOT / "docs" / "benchmarks").glob("*.png") if f"({path.name})" not in texts] == []


def test_pages_in_the_folder_of_a_page_are_filled_with_it_and_the_summary_links_to_them(
    document: Document, tmp_path: Path
) -> None:
    found = {"gloo-2": [{**document, "name": "gloo-2"}]}
    record.save(found["gloo-2"][0], tmp_path / "results")
    home, detail = tmp_path / "page.md", tmp_path / "page" / "detail.md"
    detail.parent.mkdir()
    detail.write_text("# Detail\n\n## Two ranks, over Gloo\n\n<!-- results: gloo-2 -->\n<!-- end -->\n")
    home.write_text("".join(f"<!-- headlines: {which} -->\n<!-- end -->\n" for which in ("faster", "slower")))
    assert report.main([f"--results={tmp_path / 'results'}", f"--page={home}"]) == 0
    assert "| `encode` | 4 Ki float32 |" in detail.read_text()
    assert "| average of 4 Ki float32 |" in home.read_text()
    assert "| [Two ranks, over Gloo](page/detail.md#two-ranks-over-gloo) |" in home.read_text()


def test_a_long_table_is_folded_below_the_rows_that_a_reader_needs(document: Document, tmp_path: Path) -> None:
    page = written({**document, "rows": document["rows"] * LONG}, tmp_path)
    above, _, below = page.partition('<details markdown="1">\n<summary>All ')
    assert above.count("| `encode` |") < LONG
    assert below.count("| `encode` |") == LONG
    assert below.partition("</details>")[0].endswith("|\n\n")


def test_a_table_of_machines_has_a_row_for_each_kind(document: Document) -> None:
    small, large = ({**document, "machine": {**document["machine"], "cores": cores}} for cores in (3, 5))
    found = {"a": [small, {**large, "kind": "another"}], "b": [large]}
    rows = [line for line in report.fill("<!-- machines -->\n<!-- end -->", found).splitlines() if "`" in line]
    assert rows[0].startswith("| `another` |")
    assert rows[1].startswith(f"| `{document['kind']}` |")
    assert "| 3, 5 |" in rows[1]
    assert rows[1].endswith("| 2 |")


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


def test_stages_are_said_to_be_the_hosts_where_a_gpu_averages(document: Document, tmp_path: Path) -> None:
    """There nothing waits for the device, so they are no parts of the time that an average takes."""
    document["rows"][-1]["stages"] = {"encode": 1.0, "decode": 3.0}
    shares = r"rank 0.*: encode 25%, decode 75%\."
    assert re.search(f"spends its time on {shares}", written(document, tmp_path))
    document["machine"]["device"] = "NVIDIA H200"
    page = written(document, tmp_path)
    assert re.search(f"the host of {shares}", page)
    assert "spends its time" not in page
