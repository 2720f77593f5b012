"""The JSON of a run is complete: what was measured, on what, with which versions, how fast and how right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onebit.benchmarks import machine, record
from onebit.benchmarks.record import Document

ROW = {
    "case",
    "dtype",
    "numel",
    "nbytes",
    "seconds",
    "time",
    "algbw",
    "wire_bytes",
    "wire_formula",
    "wire_busbw",
    "link_bytes",
    "stages",
    "ratios",
    "wrong",
}


def test_a_document_has_every_field(document: Document) -> None:
    assert document.keys() == {"schema", "name", "kind", "created", "machine", "versions", "run", "rows"}
    assert document["machine"].keys() == {"device", "cpu", "cores", "memory_gib", "system"}
    assert {"onebit", "torch", "numba", "numpy", "python"} <= document["versions"].keys()
    assert {"ranks", "backend", "link", "threads", "kernels", "iterations", "warmup", "seed"} <= document["run"].keys()


def test_every_row_has_every_field_and_is_right(document: Document) -> None:
    assert len(document["rows"]) == 9
    for row in document["rows"]:
        assert row.keys() == ROW
        assert row["wrong"] == 0
        assert len(row["seconds"]) == 3
        assert 0 < row["time"]["min"] <= row["time"]["median"] <= row["time"]["p99"]


def test_ratios_name_their_yardstick(document: Document) -> None:
    ratios = {row["case"]: set(row["ratios"]) for row in document["rows"]}
    assert ratios["encode"] == {"copy", "chain"}
    assert ratios["decode"] == {"copy"}
    assert ratios["compressed"] == {"plain", "bf16"}


def test_a_document_tells_no_paths(document: Document) -> None:
    assert str(Path.cwd()) not in json.dumps(document)
    assert str(Path.home()) not in json.dumps(document)


def test_a_file_is_named_by_machine_kind_name_and_date(document: Document, tmp_path: Path) -> None:
    path = record.save(document, tmp_path / "new" / "folder")
    assert path.name == f"{machine.kind()}-tiny-{document['created'][:10]}.json"
    assert record.load(path) == document


def test_another_schema_is_refused(document: Document, tmp_path: Path) -> None:
    path = record.save({**document, "schema": 0}, tmp_path)
    with pytest.raises(ValueError, match="schema 0"):
        record.load(path)


def test_results_go_beside_the_driver_in_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert record.default_folder() == Path("benchmark-results")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "driver.py").touch()
    assert record.default_folder() == Path("benchmarks/results")


def test_wrong_elements_are_summed_and_unchecked_rows_left_out(document: Document) -> None:
    document["rows"][0]["wrong"] = 3
    document["rows"][1]["wrong"] = None
    assert record.wrong(document) == 3
