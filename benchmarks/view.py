"""A result document as rows of text, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebit.benchmarks.record import Document
from onebit.benchmarks.sizes import format_size

Cells = dict[str, str]


def title(result: Document) -> str:
    """What was measured, where and with what, in one line."""
    run, versions = result["run"], result["versions"]
    return (
        f"{result['name']}: {run['ranks']} rank{'s' * (run['ranks'] != 1)}, {run['backend']}, {run['link']}; "
        f"{result['machine']['cores']} cores, torch {versions['torch']}, numba {versions['numba']}"
    )


def terminal(result: Document) -> list[Cells]:
    """Every figure that a person who ran it wants; the columns depend on what was measured."""
    return [{**_figures(row), **_ratios(row), "#wrong": number(row["wrong"])} for row in result["rows"]]


def _figures(row: Mapping[str, Any]) -> Cells:
    time = row["time"]
    cells = {
        "case": row["case"],
        "tensor": tensor(row),
        "min ms": f"{1e3 * time['min']:.3f}",
        "median ms": f"{1e3 * time['median']:.3f}",
        "p99 ms": f"{1e3 * time['p99']:.3f}",
        "algbw GB/s": f"{row['algbw']:.2f}",
    }
    if row["wire_formula"] or row["wire_bytes"]:
        cells |= wire(row) | {"busbw GB/s": f"{row['wire_busbw']:.3f}"}
    return cells


def tensor(row: Mapping[str, Any]) -> str:
    """``64 Mi float32``: what a row was measured on."""
    return f"{elements(row['numel'])} {row['dtype']}"


def elements(numel: int) -> str:
    """``64 Mi`` for 67108864."""
    size = format_size(numel)
    return size if size.isdecimal() else f"{size[:-1]} {size[-1]}i"


def wire(row: Mapping[str, Any]) -> Cells:
    """What one rank sends: as counted by onebit or else by formula, and as counted by the network interface."""
    counted = row["wire_bytes"]
    cells = {"wire MB": _megabytes(row["wire_formula"] if counted is None else counted)}
    if row["link_bytes"] is not None:
        cells["link MB"] = _megabytes(row["link_bytes"])
    return cells


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.4g}"


def _ratios(row: Mapping[str, Any]) -> Cells:
    return {f"× {role}": f"{spread['median']:.2f}" for role, spread in row["ratios"].items()}


def quartiles(spread: Mapping[str, float]) -> str:
    """A ratio with the quartiles that it lies between."""
    return f"**{spread['median']:.2f}** ({spread['low']:.2f} to {spread['high']:.2f})"


def number(count: int | None) -> str:
    """A count with thousands set apart; a dash for none."""
    return "-" if count is None else f"{count:,}"


def columns(rows: list[Cells]) -> list[str]:
    """Every column that a row has, `#wrong` last."""
    found = dict.fromkeys(name for row in rows for name in row)
    return sorted(found, key=lambda name: name == "#wrong")


def markdown(rows: list[Cells], words: int = 1) -> str:
    """A table in Markdown; the first `words` columns hold words, and the others numbers."""
    names = columns(rows)
    rule = ["---"] * words + ["---:"] * (len(names) - words)
    lines = [names, rule, *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
