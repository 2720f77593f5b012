"""A picture of loss curves, against steps and against bytes sent."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from record import Record

COLOURS = ("#d9541a", "#2f5fa8")
SMOOTHED = 15  # steps in the running mean
HIGHEST = 4.0  # nats per byte; the first steps, far above, would flatten the rest


def plot(records: Mapping[str, Record], path: Path) -> None:
    """Draw the training loss of each of `records`, by label, and its held-out loss at the end, into a PNG."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_step, by_byte = figure.subplots(1, 2, sharey=True)
    for colour, (label, record) in zip(COLOURS, records.items(), strict=False):
        sent = [total / 1e6 for total in accumulate(record.wire_bytes)]
        draw(by_step, range(1, len(sent) + 1), record, label, colour)
        draw(by_byte, sent, record, label, colour)
    finish(by_step, "Loss against steps", "step")
    finish(by_byte, "Loss against bytes on the wire", "MB sent by each rank so far (log scale)")
    by_byte.set_xscale("log")
    by_byte.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    by_step.set_ylabel("loss, nats per byte")
    by_step.legend(loc="upper right", frameon=False)
    lowest = min(min(running_mean(record.loss)) for record in records.values())
    by_step.set_ylim(lowest - 0.15, max(HIGHEST, lowest + 0.3))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw(axes: Axes, across: range | list[float], record: Record, label: str, colour: str) -> None:
    """One run: its smoothed training loss, a diamond where compression starts, a dot for its held-out loss."""
    loss = running_mean(record.loss)
    axes.plot(across, loss, color=colour, label=f"{label}, training", linewidth=1.8, alpha=0.85)
    if "compressed" in record.phase:
        start = record.phase.index("compressed")
        axes.plot(
            across[start], loss[start], "D", color=colour, label="compression starts here", ms=7, mfc="white", mew=1.8
        )
    held_out = f"{label}, held out: {record.held_out_loss:.3f}"
    axes.plot(across[-1], record.held_out_loss, "o", color=colour, label=held_out, ms=8, alpha=0.85)


def finish(axes: Axes, title: str, unit: str) -> None:
    """Title, axis and grid of one panel."""
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def running_mean(values: list[float]) -> list[float]:
    """The mean of each value and up to `SMOOTHED` - 1 before it."""
    sums = [0.0, *accumulate(values)]
    return [(sums[end] - sums[max(0, end - SMOOTHED)]) / min(end, SMOOTHED) for end in range(1, len(sums))]
