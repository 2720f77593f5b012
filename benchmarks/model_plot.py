"""The model drawn beyond what was measured: where compression pays, and how averages grow with the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onebit.benchmarks.figure import empty_figure
from onebit.benchmarks.model import Host, Wire, compressed, plain, two_level

RANKS = tuple(2**power for power in range(1, 15))
NUMELS = (10**8, 10**9, 10**10, 10**11)
RATES = tuple(float(rate) for rate in np.geomspace(0.1, 400.0, 60))  # 1e9 bits per second
LATENCY = 10e-6  # assumed, of a switched network
ON_HOST = 8
BUCKET = 1 << 27  # elements: the default on CUDA, 512 MiB
COLORS = ("#5b6670", "#2c6e8f", "#c2571a")


def wire(gbit: float) -> Wire:
    """A link of a rank of its own."""
    return Wire(rate=gbit * 1e9 / 8, latency=LATENCY)


def gain(host: Host, gbit: float, ranks: int, numel: int) -> float:
    """Plain over compressed seconds."""
    link = wire(gbit)
    return plain(host, link, ranks, numel) / compressed(host, link, ranks, numel, BUCKET)


def in_two_levels(host: Host, gbit: float, ranks: int, numel: int) -> float:
    """Seconds where hosts of `ON_HOST` ranks have a link for each of them."""
    return two_level(host, Wire(), wire(ON_HOST * gbit), ranks, numel, ON_HOST, BUCKET)


def break_even(host: Host, ranks: int, numel: int) -> float | None:
    """The fastest link, in 1e9 bits per second, on which compressed is no slower; None: any up to the fastest."""
    pays = [gain(host, rate, ranks, numel) >= 1.0 for rate in RATES]
    if all(pays):
        return None
    first = pays.index(False)
    return RATES[first - 1] if first else 0.0


def stops_scaling(host: Host, gbit: float, numel: int) -> int | None:
    """The fewest ranks at which a flat compressed average takes twice as long as with 8; None: more than are drawn."""
    link = wire(gbit)
    least = compressed(host, link, 8, numel, BUCKET)
    slow = [ranks for ranks in RANKS if ranks > 8 and compressed(host, link, ranks, numel, BUCKET) > 2 * least]
    return slow[0] if slow else None


def draw_break_even(host: Host, path: Path) -> Path:
    """Write, for each number of parameters, how many times as fast compressed is, over links and ranks; a PNG."""
    figure = empty_figure(9.2, 6.4)
    for axes, numel in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, NUMELS, strict=True):
        gains = np.array([[gain(host, rate, ranks, numel) for rate in RATES] for ranks in RANKS])
        axes.contourf(RATES, RANKS, gains, levels=[0, 1, 2, 5, 10, 20, 32], cmap="YlGnBu", extend="max")
        lines = axes.contour(RATES, RANKS, gains, levels=[1, 2, 5, 10, 20], colors="#333333", linewidths=0.8)
        axes.clabel(lines, fmt="%g×", fontsize=7)
        axes.set(xscale="log", title=f"{numel / 1e9:g} G parameters")
        axes.set_yscale("log", base=2)
    figure.supxlabel("link of each rank, Gbit/s")
    figure.supylabel("ranks")
    figure.suptitle("Model: times as fast as plain (1×: break-even)", fontsize=10)
    figure.savefig(path, dpi=120)
    return path


def draw_scaling(host: Host, numel: int, rates: Sequence[float], path: Path) -> Path:
    """Write seconds of an average over the number of ranks, one panel for each rate; a PNG."""
    figure = empty_figure(9.2, 3.6)
    for axes, rate in zip(figure.subplots(1, len(rates), sharey=True), rates, strict=True):
        grouped = [ranks for ranks in RANKS if ranks >= 2 * ON_HOST]
        curves = {
            "plain": (RANKS, [plain(host, wire(rate), ranks, numel) for ranks in RANKS]),
            "compressed, flat": (RANKS, [compressed(host, wire(rate), ranks, numel, BUCKET) for ranks in RANKS]),
            f"two-level, {ON_HOST} ranks on a host": (
                grouped,
                [in_two_levels(host, rate, ranks, numel) for ranks in grouped],
            ),
        }
        for color, (name, (ranks, seconds)) in zip(COLORS, curves.items(), strict=True):
            axes.plot(ranks, seconds, "o-", ms=3, color=color, label=name)
        axes.set(yscale="log", xlabel="ranks", title=f"{rate:g} Gbit/s")
        axes.set_xscale("log", base=2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"seconds of {numel / 1e9:g} G numbers")
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle("Model", fontsize=10)
    figure.savefig(path, dpi=120)
    return path


def rate_text(gbit: float | None) -> str:
    """A break-even as a cell: two digits, ``"> 400"`` where any drawn link pays."""
    if gbit is None:
        return f"> {RATES[-1]:.0f}"
    return "never" if gbit == 0.0 else f"{gbit:.{max(0, 1 - math.floor(math.log10(gbit)))}f}"
