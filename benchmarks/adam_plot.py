"""A picture of the Adam benchmark: the time of every implementation as a multiple of CPUAdam's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onebit.benchmarks.record import Document
from onebit.benchmarks.view import elements


def relative_times(result: Document) -> dict[str, dict[str, float]]:
    """For each tensor, by what factor each yardstick takes longer than CPUAdam; where torch takes part."""
    panels: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if "fused" not in row["ratios"]:
            continue
        _, _, kind = row["case"].partition(", ")
        title = f"{elements(row['numel'])} {row['dtype']}" + (f"\n{kind}" if kind else "")
        panels[title] = {role: spread["median"] for role, spread in row["ratios"].items()}
    return panels


def plot(result: Document, path: Path) -> Path:
    """Write the picture to `path`, a PNG, and return that."""
    from matplotlib.figure import Figure

    panels = relative_times(result)
    figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
    for axes, (title, times) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        bars: Mapping[str, float] = {"CPUAdam": 1.0, **times}
        drawn: Any = axes.barh(list(bars), list(bars.values()), color=["#2c6e8f", *["#b9c4cc"] * len(times)])
        axes.bar_label(drawn, fmt="%.2f", padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("times CPUAdam", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path
