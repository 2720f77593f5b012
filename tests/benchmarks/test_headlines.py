"""The summary has figures of the results alone, losses apart from gains, and says which goals were missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onebit.benchmarks import headlines, report
from onebit.benchmarks.headline import Headline, ratio, step, to_the_loss, trained
from onebit.benchmarks.record import Document

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 0.125, "high": median + 0.125}


def averages(*figures: tuple[int, float], link: str = "2 namespaces, 10gbit", device: str = "cpu") -> Document:
    rows = [
        {"case": "compressed", "dtype": "float32", "numel": numel, "ratios": {"plain": spread(median)}}
        for numel, median in figures
    ]
    run = {"ranks": 2, "link": link}
    return {"name": "net", "kind": "any", "machine": {"device": device, "cores": 7}, "run": run, "rows": rows}


def lines(which: str, result: Document, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[dict[str, str]]:
    headline = Headline(result="net", what="average of {}", beside="plain", **options)
    monkeypatch.setattr(headlines, "HEADLINES", (headline,))
    return headlines.lines(which, {"net": [result]}, {"net": "[Net](a.md#net)"})


def test_a_line_says_what_where_and_beside_what(monkeypatch: pytest.MonkeyPatch) -> None:
    result = averages((1 << 14, 0.25), (1 << 24, 3.25))
    assert lines("faster", result, monkeypatch, pick=ratio("compressed", "plain"), goal=3) == [
        {
            "what": "average of 16 Mi float32",
            "on": "2 hosts, 10 Gbit/s, 7 CPU cores",
            "beside": "plain",
            "times as fast": "**3.25** (3.12 to 3.38)",
            "goal": "3",
            "details": "[Net](a.md#net)",
        }
    ]


@pytest.mark.parametrize(("median", "which"), [(0.99, "slower"), (1.0, "faster")])
def test_a_figure_stands_where_it_belongs_whatever_was_hoped(
    median: float, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in ("faster", "slower"):
        found = lines(table, averages((8, median)), monkeypatch, pick=ratio("compressed", "plain"), goal=2)
        assert len(found) == (table == which)
        assert all(line["goal"] == "2, missed" for line in found)


def test_a_figure_over_one_backend_is_not_taken_from_a_result_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    result = averages((8, 3.25))
    result["run"]["backend"] = "nccl"
    for over, found in (("nccl", 1), ("gloo", 0)):
        assert len(lines("faster", result, monkeypatch, pick=ratio("compressed", "plain"), over=over)) == found


def test_less_than_a_measure_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    pick = ratio("compressed", "plain")
    assert lines("slower", averages((8, 0.9)), monkeypatch, pick=pick, measure=True) == []
    assert len(lines("faster", averages((8, 0.9)), monkeypatch, pick=pick, measure=True)) == 1


def test_gpus_are_counted_and_a_link_that_says_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pick = ratio("compressed", "plain")
    for link, where in (("TCP sockets", "TCP sockets, 2 × GPU"), ("this machine", "2 × GPU")):
        (line,) = lines("faster", averages((8, 2.0), link=link, device="GPU"), monkeypatch, pick=pick)
        assert line["on"] == where


def test_what_a_result_lacks_is_no_figure() -> None:
    result = averages((8, 2.0))
    assert ratio("compressed", "plain", 8)(result) == ("8 float32", spread(2.0))
    assert ratio("compressed", "plain", 16)(result) is None
    assert ratio("compressed", "copy")(result) is None
    assert ratio("two-level", "plain")(result) is None


def test_steps_and_whole_runs_are_put_over_plain_ones() -> None:
    rows = [
        {"case": "AdamW, DDP", "parameters": 2_000_000, "to_target": {"seconds": 9.0}, "times_plain": {}},
        {"case": "Ours", "to_target": {"seconds": 4.0}, "times_plain": {"compressed": spread(3.0)}},
        {"case": "Never", "to_target": None, "times_plain": {}},
    ]
    result = {"rows": rows}
    assert trained("Ours", "compressed")(result) == ("2.0 million parameters", spread(3.0))
    assert trained("Never", "local")(result) is None
    assert to_the_loss("Ours")(result) == ("2.0 million parameters", {"median": 2.25})
    assert to_the_loss("Never")(result) is None


def test_a_step_that_takes_less_time_is_faster() -> None:
    taken = {"median": 0.25, "low": 0.2, "high": 0.5}
    result = {"rows": [{"numel": 3_000_000}], "run": {"time over DDP": {"ours": taken}}}
    assert step("ours")(result) == ("3 million parameters", {"median": 4.0, "low": 2.0, "high": 5.0})
    assert step("theirs")(result) is None


def test_every_headline_that_has_a_result_has_a_figure() -> None:
    found = report.newest(RESULTS)
    for headline in headlines.HEADLINES:
        results = found.get(headline.result, [])
        figures = [headline.figure(result) for result in results]
        assert not results or any(figures), f"{headline}: nothing is found in {headline.result}"


def test_the_anchor_of_a_heading_is_what_the_site_makes_of_it() -> None:
    text = "# A\n\n## Codecs, and 2 levels\n<!-- results: x -->\n<!-- end -->\n"
    assert report.places({"p/a.md": text}) == {"x": "[Codecs, and 2 levels](p/a.md#codecs-and-2-levels)"}
