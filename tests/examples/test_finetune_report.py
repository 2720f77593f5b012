"""The page about fine-tuning shows the numbers of the document that lies beside the other results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from onebit.benchmarks import record

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "clients" / "finetune_report.py"
PAGE = ROOT / "docs" / "recipes" / "finetune.md"


def printed(*paths: Path) -> str:
    return subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True, check=True).stdout


def newest() -> Path:
    return max((ROOT / "benchmarks" / "results").glob("*-finetune-minilm-*.json"), key=lambda path: path.name[-15:])


def test_the_page_shows_the_table_of_the_newest_document() -> None:
    assert printed(newest()).strip() in PAGE.read_text()


def test_accuracies_of_both_optimizers_are_within_a_point_in_the_newest_document() -> None:
    rows = record.load(newest())["rows"]
    sums = {name: sum(row["accuracy"] for row in rows if row["optimizer"] == name) for name in ("adamw", "onebit-adam")}
    assert abs(sums["adamw"] - sums["onebit-adam"]) / (len(rows) / 2) <= 0.01


def test_a_table_has_means_and_bytes(tmp_path: Path) -> None:
    rows = [
        {"optimizer": "onebit-adam", "seed": 1, "accuracy": 0.7, "wire_bytes": 2e9, "dense_bytes": 1e10},
        {"optimizer": "onebit-adam", "seed": 0, "accuracy": 0.8, "wire_bytes": 2e9, "dense_bytes": 1e10},
        {"optimizer": "adamw", "seed": 0, "accuracy": 0.79},
        {"optimizer": "adamw", "seed": 1, "accuracy": 0.75},
    ]
    path = record.save(record.make("finetune-minilm", {}, rows), tmp_path)
    assert printed(path).splitlines()[:4] == [
        "|  | seed 0 | seed 1 | mean | sent by a rank |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `AdamW` | 79.0 % | 75.0 % | 77.0 % | 10.0 GB |",
        "| `OnebitAdam` | 80.0 % | 70.0 % | 75.0 % | 2.0 GB |",
    ]
