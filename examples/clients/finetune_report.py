"""Print the table of docs/recipes/finetune.md, made from a document that finetune_minilm.py has written.

python examples/clients/finetune_report.py benchmarks/results/*-finetune-minilm-*.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onebit.benchmarks import record

NAMES = {"adamw": "`AdamW`", "onebit-adam": "`OnebitAdam`"}


def table(document: Mapping[str, Any]) -> str:
    """Right answers in percent, per optimizer and seed, and what a rank has sent in one run, in Markdown."""
    rows = document["rows"]
    seeds = sorted({row["seed"] for row in rows})
    titles = ["", *(f"seed {seed}" for seed in seeds), "mean", "sent by a rank"]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    dense = next(row["dense_bytes"] for row in rows if "dense_bytes" in row)
    for optimizer, name in NAMES.items():
        own = sorted((row for row in rows if row["optimizer"] == optimizer), key=lambda row: row["seed"])
        shares = [100 * row["accuracy"] for row in own]
        numbers = [f"{share:.1f} %" for share in [*shares, sum(shares) / len(shares)]]
        lines.append([name, *numbers, f"{own[0].get('wire_bytes', dense) / 1e9:.1f} GB"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(table(record.load(Path(argument))))
