"""The result of steps with exchanges during backward, and after it, as rows of text."""

from __future__ import annotations

from onebit.benchmarks.record import Document
from onebit.benchmarks.view import Cells, quartiles

BESIDE = ("time over DDP", "time over overlap=False")


def is_overlap(result: Document) -> bool:
    """Whether a result is one of `onebit.benchmarks.overlap`."""
    return "time over overlap=False" in result["run"]


def cells(result: Document) -> list[Cells]:
    """A row of text for each kind of step; what it took is over what others took in the same turns."""
    run = result["run"]
    lines = []
    for row in result["rows"]:
        line = {"case": f"`{row['case']}`", "buckets sent in backward": ""}
        if row["case"] in run["buckets"]:
            early, buckets = run["buckets"][row["case"]]
            line["buckets sent in backward"] = f"{early} of {buckets}" if buckets else "none"
        for beside in BESIDE:
            if beside in run:
                spread = run[beside].get(row["case"])
                line[beside] = quartiles(spread) if spread else ""
        lines.append(line)
    return lines


def title(result: Document) -> str:
    """What a step is made of, and whether all ranks had the same bits after it."""
    run = result["run"]
    parts = [f"{result['rows'][0]['numel'] / 1e6:.1f} million parameters"]
    if "tokens per rank" in run:
        parts.append(f"{run['tokens per rank']:,} tokens per rank")
    if "compute" in run:
        parts.append(f"computing: {run['compute']}")
    if "exchange over backward" in run:
        parts.append(f"exchange and update take {run['exchange over backward']:.2f} of the time of backward")
    equal = run.get("replicas bit-equal", run.get("bit-equal"))
    parts.append(f"replicas are {'' if equal else 'not '}bit-equal")
    return "; ".join(parts)
