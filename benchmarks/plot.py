"""`python -m onebit.benchmarks plot FILES`: a PNG beside each JSON result, or of all that a folder holds.

A sweep over sizes becomes lines: times, and ratios to the yardsticks. One size becomes bars of ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onebit.benchmarks import console, record
from onebit.benchmarks.figure import empty_figure
from onebit.benchmarks.record import Document
from onebit.benchmarks.view import elements

OURS, THEIRS = "#2c6e8f", "#b9c4cc"
LINES = ("#2c6e8f", "#c2571a", "#7a8b3a", "#8a5a83", "#5b6670", "#b08b2e")
STYLES = ("-", "--", ":")

Rows = Sequence[Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every picture is written; 2: there is nothing to draw."""
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks plot", description=__doc__)
    flags.add_argument("results", type=Path, nargs="+", help="JSON results, or folders of them")
    options = flags.parse_args(arguments)
    found = [(path, record.load(path)) for given in options.results for path in record.paths(given)]
    drawable = [(path, result) for path, result in found if pictured(result)]
    if not drawable:
        flags.error(f"nothing to draw in {', '.join(map(str, options.results))}")
    for path, result in drawable:
        console.say(f"plot: {draw(result, path.with_suffix('.png'))}")
    return 0


def pictured(result: Document, role: str | None = None) -> bool:
    """Whether `draw` of the same arguments has something to draw: times of several sizes, or ratios."""
    return bool(sweeps(result["rows"]) or ratios(result["rows"], role))


def draw(result: Document, path: Path, role: str | None = None) -> Path:
    """Write the picture of a result to `path`, a PNG, and return that.

    role: the one yardstick that bars are drawn of; None: all.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    swept, bars = sweeps(result["rows"]), ratios(result["rows"], role)
    height = 3.6 if swept else 1.0 + 0.22 * len(bars)
    figure = empty_figure(9.2 if swept else 7.0, height)
    if swept:
        times, faster = figure.subplots(1, 2)
        _draw_times(times, swept)
        _draw_ratios(faster, swept)
    else:
        _draw_bars(figure.subplots(), bars)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def sweeps(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each case that was measured at several sizes, ascending."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if "numel" in row and "time" in row:
            name = row["case"] if row["dtype"] == "float32" else f"{row['case']}, {row['dtype']}"
            found.setdefault(name, {})[row["numel"]] = row
    return {name: [sizes[numel] for numel in sorted(sizes)] for name, sizes in found.items() if len(sizes) > 2}


def ratios(rows: Rows, only: str | None = None) -> dict[str, Mapping[str, float]]:
    """The quartiles of each case's ratio to each of its yardsticks, or to one, by a name that says which."""
    return {
        f"{row['case']}, {elements(row['numel'])} {row['dtype']}, over {role}": spread
        for row in rows
        for role, spread in row.get("ratios", {}).items()
        if only in (None, role)
    }


def _draw_times(axes: Any, swept: Mapping[str, Rows]) -> None:
    for index, (name, rows) in enumerate(swept.items()):
        numels, times = [row["numel"] for row in rows], [1e3 * row["time"]["median"] for row in rows]
        color, style = LINES[index % len(LINES)], STYLES[index // len(LINES) % len(STYLES)]
        axes.plot(numels, times, style, marker="o", ms=3, color=color, label=name)
        low, high = ([1e3 * row["time"][key] for row in rows] for key in ("min", "p99"))
        axes.fill_between(numels, low, high, color=color, alpha=0.15, linewidth=0)
    _log_axes(axes, "median time, ms", marks=(1,))
    axes.legend(fontsize=7, frameon=False)


def _draw_ratios(axes: Any, swept: Mapping[str, Rows]) -> None:
    for index, (name, rows) in enumerate(swept.items()):
        color = LINES[index % len(LINES)]
        roles = dict.fromkeys(role for row in rows for role in row["ratios"])
        for role, style in zip(roles, STYLES * len(roles), strict=False):
            known = [row for row in rows if role in row["ratios"]]
            numels, spreads = [row["numel"] for row in known], [row["ratios"][role] for row in known]
            label = f"{name}, times {role}"
            axes.plot(numels, [s["median"] for s in spreads], style, marker="o", ms=3, color=color, label=label)
            quartiles = [s["low"] for s in spreads], [s["high"] for s in spreads]
            axes.fill_between(numels, *quartiles, color=color, alpha=0.15, linewidth=0)
    axes.axhline(1.0, color=THEIRS, linewidth=1)
    _log_axes(axes, "times as fast", marks=(1, 2, 5))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def _log_axes(axes: Any, label: str, marks: tuple[float, ...]) -> None:
    from matplotlib.ticker import LogLocator

    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel=label)
    axes.yaxis.set_major_locator(LogLocator(subs=marks))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _draw_bars(axes: Any, bars: Mapping[str, Mapping[str, float]]) -> None:
    values = [spread["median"] for spread in bars.values()]
    drawn = axes.barh(list(bars), values, color=OURS)
    axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1.0, color=THEIRS, linewidth=1)
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.5 / (len(bars) + 1))
    if max(values) > 20 * min(values):
        axes.set_xscale("log")
    axes.set_xlabel("times the bandwidth of the yardstick")
