"""A training run's result as rows of text, as a picture of loss over time, and beside a whole run of the same plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onebit.benchmarks.contenders import PLAIN
from onebit.benchmarks.figure import empty_figure
from onebit.benchmarks.plot import LINES
from onebit.benchmarks.record import Document
from onebit.benchmarks.training import ALONE, estimate
from onebit.benchmarks.view import Cells, quartiles

KINDS = ("exact", "compressed", "local")


def is_training(result: Document) -> bool:
    """Whether a result is one of `onebit.benchmarks.train`."""
    return "learns" in result["run"]


def title(result: Document) -> str:
    """What was trained, where, and how much of plain AdamW's step is communication."""
    run, rows = result["run"], result["rows"]
    said = f"{rows[0]['parameters'] / 1e6:.1f} million parameters, {run['ranks']} ranks, {run['link']}"
    return f"{said}; plain AdamW communicates for {communication(result):.0%} of its step"


def is_drawn(result: Document) -> bool:
    """Whether `draw` has something to draw: a run that learned."""
    return is_training(result) and bool(result["run"]["learns"])


def communication(result: Document) -> float:
    """The share of plain AdamW's step that goes away where nothing is averaged."""
    alone = named(result["rows"], ALONE)
    return 1.0 - 1.0 / float(alone["times_plain"]["local"]["median"])


def cells(result: Document, whole: Document | None = None) -> list[Cells]:
    """A row of text for each contender and kind of step.

    whole: a run that learned; where `result` has none, the steps to the same loss are taken from it.
    """
    learned = result if result["run"]["learns"] else whole
    return [
        found
        for row in result["rows"]
        for found in _cells(row, result["rows"], named(learned["rows"], row["case"]) if learned else None, learned)
    ]


def whole_run(result: Document, found: Mapping[str, Sequence[Document]]) -> Document | None:
    """A run that learned what `result` trains, on as many ranks on the same kind of machine; None: there is none.

    found: results by name.
    """
    for others in found.values():
        for other in others:
            if is_training(other) and other["run"]["learns"] and _alike(other, result):
                return other
    return None


def _alike(one: Document, other: Document) -> bool:
    return all(one["run"][key] == other["run"][key] for key in ("ranks", "shape", "batch")) and (
        one["kind"] == other["kind"]
    )


def _cells(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], learned: Mapping[str, Any] | None, whole: Document | None
) -> list[Cells]:
    """One line for each kind of step; what the whole run came to stands in the last."""
    kinds = [kind for kind in KINDS if kind in row["seconds"]]
    lines = []
    for kind in kinds:
        faster, link = row["times_plain"][kind], row["link_bytes"].get(kind)
        lines.append(
            {
                "optimizer": row["case"] if kind == kinds[0] else "",
                "step": kind,
                "of all": f"{_share(learned or row, kind):.0%}",
                "MB on the link": "-" if link is None else f"{link / 1e6:.2f}",
                "times plain": quartiles(faster),
                "held-out loss": "",
                "time to loss": "",
            }
        )
    if lines and learned and whole and learned.get("held_out"):
        lines[-1]["held-out loss"] = f"{learned['held_out'][-1]['loss']:.3f}"
        lines[-1]["time to loss"] = _relative(row, rows, learned, whole["rows"])
    return lines


def _relative(
    row: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    learned: Mapping[str, Any],
    all_learned: Sequence[Mapping[str, Any]],
) -> str:
    """Time to the target over plain AdamW's: measured where the run learned, else steps of each kind times theirs."""
    reached, plain = learned["to_target"], named(all_learned, PLAIN)["to_target"]
    if reached is None or plain is None:
        return "not reached"
    if learned is row:
        return f"{reached['seconds'] / plain['seconds']:.2f}"
    mine = estimate(reached["steps"], row["seconds"])
    theirs = estimate(plain["steps"], named(rows, PLAIN)["seconds"])
    return "-" if mine is None or theirs is None else f"{mine / theirs:.2f}, by its steps"


def _share(row: Mapping[str, Any], kind: str) -> float:
    return float(row["steps"].get(kind, 0) / sum(row["steps"].values()))


def named(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The one row of a contender."""
    (found,) = [row for row in rows if row["case"] == name]
    return found


def draw(result: Document, path: Path) -> Path:
    """Write held-out loss over time to `path`, a PNG; returns that.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    figure = empty_figure(7.0, 3.6)
    axes = figure.subplots()
    drawn = [row for row in result["rows"] if "held_out" in row]
    for color, row in zip(LINES, drawn, strict=False):
        seconds = [point["seconds"] for point in row["held_out"]]
        axes.plot(seconds, [point["loss"] for point in row["held_out"]], "o-", ms=3, color=color, label=row["case"])
    axes.set(xscale="log", xlabel="seconds of steps", ylabel="held-out loss, nats per byte")
    axes.set_title(f"{result['run']['ranks']} ranks, {result['run']['link']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)
    return path
