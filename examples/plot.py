"""A picture of loss curves, against steps and against bytes sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from record import Record

COLOURS = ("#d9541a", "#2f5fa8")
DOT_SIZES = (11, 6)  # so that a dot on top of another hides it not
SMOOTHED = 25  # steps in the running mean
HIGHEST = 4.0  # nats per byte; the first steps, far above, would flatten the rest


def plot(records: Mapping[str, Record], path: Path) -> None:
    """Draw the training loss of each of `records`, by label, and its held-out loss at the end, into a PNG."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_step, by_byte = figure.subplots(1, 2, sharey=True)
    for place, (label, record) in enumerate(records.items()):
        sent = [total / 1e6 for total in accumulate(record.wire_bytes)]
        draw(by_step, range(1, len(sent) + 1), record, label, place)
        draw(by_byte, sent, record, label, place)
    by_step.set_ylabel("loss, nats per byte")
    by_step.legend(loc="upper right", frameon=False)
    finish(by_step, "Loss against steps", "step")
    finish(by_byte, "Loss against bytes on the wire", "MB sent by each rank so far (log scale)")
    in_megabytes(by_byte)
    limit(by_step, by_byte, list(records.values()))
    figure.suptitle(describe(next(iter(records.values()))))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw(axes: Axes, across: Sequence[float], record: Record, label: str, place: int) -> None:
    """One run: its smoothed training loss, a diamond where compression starts, a dot for its held-out loss."""
    colour = COLOURS[place % len(COLOURS)]
    loss = running_mean(record.loss)
    axes.plot(
        across, loss, color=colour, label=f"{label}, training (mean of {SMOOTHED} steps)", linewidth=1.8, alpha=0.85
    )
    if "compressed" in record.phase:
        start = record.phase.index("compressed")
        axes.plot(
            across[start], loss[start], "D", color=colour, label="compression starts here", ms=7, mfc="white", mew=1.8
        )
    held_out = f"{label}, held out: {record.held_out_loss:.3f}"
    axes.plot(across[-1], record.held_out_loss, "o", color=colour, label=held_out, ms=DOT_SIZES[place % len(DOT_SIZES)])


def finish(axes: Axes, title: str, unit: str) -> None:
    """Title, axis and grid of one panel."""
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def in_megabytes(axes: Axes) -> None:
    """A logarithmic axis that says 50, 100, 200 instead of powers of ten."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def limit(by_step: Axes, by_byte: Axes, records: Sequence[Record]) -> None:
    """Show losses below `HIGHEST` and the bytes from where the first curve comes into view."""
    curves = [running_mean(record.loss) for record in records]
    lowest = min(map(min, curves))
    highest = max(HIGHEST, lowest + 0.5)
    by_step.set_ylim(lowest - 0.15, highest)
    hidden = min(sum(loss > highest for loss in curve) for curve in curves)
    in_view = min(sum(record.wire_bytes[: hidden + 1]) for record in records) / 1e6
    if in_view > 0:
        by_byte.set_xlim(left=in_view * 0.8)


def describe(record: Record) -> str:
    """What was trained on what, in a line."""
    ranks, backend = record.environment["world_size"], record.environment["backend"]
    return f"Transformer of {record.parameters:,} parameters on Python's own sources, {ranks} ranks over {backend}"


def running_mean(values: list[float]) -> list[float]:
    """The mean of each value and up to `SMOOTHED` - 1 before it."""
    sums = [0.0, *accumulate(values)]
    return [(sums[end] - sums[max(0, end - SMOOTHED)]) / min(end, SMOOTHED) for end in range(1, len(sums))]
