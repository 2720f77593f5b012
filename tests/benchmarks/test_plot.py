"""Pictures show what was measured: a sweep as lines, one size as bars, and nothing where nothing can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from onebit.benchmarks import plot, record
from onebit.benchmarks.__main__ import main
from onebit.benchmarks.record import Document

PNG = b"\x89PNG"


def swept(document: Document, sizes: int) -> Document:
    """The same rows at several sizes."""
    rows = [{**row, "numel": row["numel"] << step} for step in range(sizes) for row in document["rows"]]
    return {**document, "rows": rows}


def test_a_case_of_three_sizes_is_a_line_and_of_two_is_not(document: Document) -> None:
    lines = plot.sweeps(swept(document, 3)["rows"])
    assert set(lines) == {row["case"] for row in document["rows"]}
    assert [row["numel"] for row in lines["compressed"]] == [4096, 8192, 16384]
    assert plot.sweeps(swept(document, 2)["rows"]) == {}


def test_every_ratio_of_one_size_is_a_bar(document: Document) -> None:
    bars = plot.ratios(document["rows"])
    assert "encode, 4 Ki float32, over copy" in bars
    assert "compressed, 4 Ki float32, over plain" in bars
    assert len(bars) == sum(len(row["ratios"]) for row in document["rows"])


@pytest.mark.parametrize("sizes", [1, 3])
def test_a_folder_of_results_is_drawn(document: Document, sizes: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = record.save(swept(document, sizes), tmp_path)
    (tmp_path / "of-another-kind.json").write_text('{"tests": 3}')
    assert main(["plot", f"{tmp_path}"]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(PNG)
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_a_result_without_ratios_is_said_to_have_nothing_to_draw(
    document: Document, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = {**document, "rows": [{**document["rows"][0], "ratios": {}}]}
    path = record.save(bare, tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["plot", f"{path}"])
    assert "nothing to draw" in capsys.readouterr().err


def test_a_run_draws_its_result_if_asked(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["-b4K", "-n2", "-w1", "--cases=kernels", f"--output={tmp_path}", "--plot"]) == 0
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".png"]
