"""An empty picture, or what to install to get one."""

from __future__ import annotations

from typing import Any


def empty_figure(width: float, height: float) -> Any:
    """Return a matplotlib figure of so many inches.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit('plots need the package "matplotlib": pip install "onebit[bench]"') from error
    return Figure(figsize=(width, height), layout="constrained")
