"""The page about fully_shard shows the numbers of the documents that lie beside the other results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onebit.benchmarks import record

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "hsdp_report.py"
PAGE = ROOT / "docs" / "recipes" / "fsdp.md"


def printed(*paths: Path) -> str:
    return subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True, check=True).stdout


def documents() -> list[Path]:
    return sorted((ROOT / "benchmarks" / "results").glob("*-hsdp-gpt*.json"))


def test_the_page_shows_the_table_of_the_documents() -> None:
    assert printed(*documents()).strip() in PAGE.read_text()


@pytest.mark.parametrize(("averages", "dense_steps"), [("int8", 225), ("onebit-adam", 450)])
def test_compressed_averages_end_within_a_percent_of_fsdps_own(averages: str, dense_steps: int) -> None:
    runs = [{row["case"]: row for row in record.load(path)["rows"]} for path in documents()]
    (run,) = [run for run in runs if averages in run and run[averages]["dense_steps"] == dense_steps]
    ours, fsdps = (run[name]["held_out"][-1]["loss"] for name in (averages, "fsdp"))
    assert ours / fsdps - 1 < 0.01


def test_a_table_has_losses_beside_the_first_of_their_run(tmp_path: Path) -> None:
    def row(case: str, loss: float, dense: int) -> dict[str, object]:
        held_out = [{"step": 1000, "loss": 9.0}, {"step": 2000, "loss": loss}]
        speed = {"first": 1.0, "median": 0.05}
        known = {"steps": 2000, "wire_bytes": 3.2e9, "seconds_per_step": speed}
        return {"case": case, "held_out": held_out, "dense_steps": dense, **known}

    paths = [
        record.save(record.make(f"hsdp-gpt-{n}", {}, rows), tmp_path)
        for n, rows in enumerate([[row("fsdp", 2.0, 2000), row("int8", 2.02, 100)], [row("fsdp", 4.0, 2000)]])
    ]
    assert printed(*paths).splitlines()[2:] == [
        "| `fsdp` | 2,000 of 2,000 | 2.0000 |  | 3 GB | 50 ms |",
        "| `int8` | 100 of 2,000 | 2.0200 | +1.00% | 3 GB | 50 ms |",
        "| `fsdp` | 2,000 of 2,000 | 4.0000 |  | 3 GB | 50 ms |",
    ]
