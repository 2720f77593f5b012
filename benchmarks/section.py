"""One result as a section of a page: a caption, a table, where the time went, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onebit.benchmarks import overlap_view, training_view, view
from onebit.benchmarks.digest import digest
from onebit.benchmarks.record import Document
from onebit.benchmarks.view import Cells, markdown


def section(result: Document, found: Mapping[str, Sequence[Document]], picture: str | None) -> str:
    """The Markdown of a result.

    found: all results by name, as some are shown beside others; picture: the file that shows it, None without one.
    """
    shown = [f"![{result['name']} on {result['kind']}]({picture})"] if picture else []
    return "\n\n".join([_caption(result), *_body(result, found), *shown])


def _body(result: Document, found: Mapping[str, Sequence[Document]]) -> list[str]:
    """The table, and what is said below it."""
    if training_view.is_training(result):
        rows = training_view.cells(result, training_view.whole_run(result, found))
        return [markdown(rows), f"{training_view.title(result)}."]
    if overlap_view.is_overlap(result):
        return [markdown(overlap_view.cells(result)), f"{overlap_view.title(result)}."]
    rows = [_columns_of(row) for row in result["rows"]]
    shown = [rows[index] for index in digest(result["rows"])]
    tables = [markdown(shown)] if shown else []
    if len(shown) < len(rows):
        tables.append(_folded(rows))
    on_host = result["machine"]["device"] == "cpu"
    shares = [_shares(row, on_host) for row in result["rows"] if row.get("stages")]
    return [*tables, *shares[-1:]]  # of the largest size


def _folded(rows: list[Cells]) -> str:
    """A table that opens at a click; the site needs `markdown="1"` to look inside, and GitHub passes over it."""
    summary = f"<summary>All {len(rows)} rows</summary>"
    return f'<details markdown="1">\n{summary}\n\n{markdown(rows)}\n\n</details>'


def _shares(row: Mapping[str, Any], on_host: bool) -> str:
    """The stages of a case as parts of the host's time; what a rank waits for counts where it waits.

    on_host: the host is what averages; else it only tells a device to, which works meanwhile.
    """
    total = sum(row["stages"].values()) or 1.0
    parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in row["stages"].items())
    case = f"`{row['case']}` of {view.tensor(row)}"
    if on_host:
        return f"Where {case} spends its time on rank 0: {parts}."
    return f"What the host of rank 0 takes to start {case}, while the GPU works: {parts}."


def _caption(result: Document) -> str:
    run, box, versions = result["run"], result["machine"], result["versions"]
    ranks = f"{run['ranks']} ranks, {run['backend']}, {run['link']}" if run["ranks"] > 1 else "one process"
    threads = run.get("threads", 1) if box["device"] == "cpu" else 1  # a result without it had one
    stripes = run.get("stripes", 1)
    ranks += f", {stripes} stripes" * (stripes > 1)
    ranks += f", {threads} threads{' each' * (run['ranks'] > 1)}" * (threads > 1)
    times = f"{run['iterations']} rounds" if "iterations" in run else f"median of {run['repeats']} processes"
    together = run.get("together", 1)
    times += f" of {together} runs in a row" * (together > 1)
    packages = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "numba", "numpy"))
    priority = "" if run["priority"] == "normal" else f"; priority: {run['priority']}"
    device = f"{box['cpu']}, {box['cores']} cores" if box["device"] == "cpu" else box["device"]
    return f"{device}; {ranks}; {times}{priority}; {packages}; {result['created'][:10]}."


def _columns_of(row: Mapping[str, Any]) -> Cells:
    """A row of the documentation: ratios and counts, no times."""
    if "cache" in row:
        seconds = {name: value for name, value in row["seconds"].items() if not name.endswith("again")}
        return {"compile cache": row["cache"], **{f"{name}, s": f"{value:.2f}" for name, value in seconds.items()}}
    cells = {"case": f"`{row['case']}`", "tensor": view.tensor(row)}
    if row["wire_formula"] or row["wire_bytes"]:
        cells |= _wire(row)
    else:
        cells["bytes per element"] = f"{row['nbytes'] / row['numel']:.2f}"
    cells |= {f"times {role}": view.quartiles(spread) for role, spread in row["ratios"].items()}
    return cells | {"#wrong": view.number(row["wrong"])}


def _wire(row: Mapping[str, Any]) -> Cells:
    """Bytes that one rank sends in one run."""
    cells = {"wire bytes, formula": view.number(row["wire_formula"] or None), "counted": view.number(row["wire_bytes"])}
    if row["link_bytes"] is not None:
        cells["on the link"] = view.number(row["link_bytes"])
    return cells
