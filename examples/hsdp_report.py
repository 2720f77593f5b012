"""Print the table of docs/recipes/fsdp.md, made from documents that train_gpt_hsdp.py has written, one for each run.

python examples/hsdp_report.py benchmarks/results/*-hsdp-gpt-*.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onebit.benchmarks import record

TITLES = ("averages over replicas", "in fp32 until step", "held-out loss", "to FSDP's", "sent to replicas", "a step")


def table(documents: Sequence[Mapping[str, Any]]) -> str:
    """What each kind of average ended with, the first of its run being FSDP's own, in Markdown."""
    lines = [TITLES, ("---", *["---:"] * (len(TITLES) - 1))]
    for document in documents:
        first = document["rows"][0]
        for row in document["rows"]:
            loss, baseline = (each["held_out"][-1]["loss"] for each in (row, first))
            lines.append(
                (
                    f"`{row['case']}`",
                    f"{row['dense_steps']:,} of {row['steps']:,}",
                    f"{loss:.4f}",
                    "" if row is first else f"{loss / baseline - 1:+.2%}",
                    f"{row['wire_bytes'] / 1e9:.0f} GB",
                    f"{1e3 * row['seconds_per_step']['median']:.0f} ms",
                )
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table([record.load(Path(argument)) for argument in sys.argv[1:]]))
