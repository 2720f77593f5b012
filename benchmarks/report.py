"""`python -m onebit.benchmarks.report`: the tables and plots of docs/benchmarks.md from the newest JSON results.

A page marks where a table stands by a line ``<!-- results: NAME -->`` and a later line ``<!-- end -->``; what is
between them is replaced. NAME is the name of a result: ``kernels``, ``gloo-2``, ``net-1gbit``, ``first-call``. A result
of several sizes is also drawn, as is one whose mark ends in ``with plot`` or ``with plot of ROLE``, a yardstick.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onebit.benchmarks import console, plot, record, training_view, view
from onebit.benchmarks.view import Cells

SECTION = re.compile(
    r"(?m)^<!-- results: (?P<name>\S+)(?P<plot> with plot(?: of (?P<role>\S+))?)? -->\n"
    r"(?:.*\n)*?<!-- end -->$"
)


def newest(folder: Path) -> dict[str, list[record.Document]]:
    """For each name the newest result of each kind of machine, kinds in alphabetical order."""
    latest: dict[tuple[str, str], record.Document] = {}
    for path in record.paths(folder):
        result = record.load(path)
        key = (result["name"], result["kind"])
        if key not in latest or latest[key]["created"] < result["created"]:
            latest[key] = result
    found: dict[str, list[record.Document]] = {}
    for (name, _), result in sorted(latest.items(), key=lambda item: item[0]):
        found.setdefault(name, []).append(result)
    return found


def fill(page: str, found: Mapping[str, Sequence[record.Document]]) -> str:
    """`page` with every marked section made anew; a section without results keeps what it has."""

    def section(match: re.Match[str]) -> str:
        blocks = [_block(result, found, _is_drawn(result, match)) for result in found.get(match["name"], ())]
        if not blocks:
            return match[0]
        return "\n".join([match[0].partition("\n")[0], "\n\n".join(blocks), "<!-- end -->"])

    return SECTION.sub(section, page)


def draw(page: str, found: Mapping[str, Sequence[record.Document]], folder: Path) -> None:
    """Write the pictures that the marked sections of `page` show to `folder`."""
    for match in SECTION.finditer(page):
        for result in found.get(match["name"], ()):
            if _is_drawn(result, match):
                if training_view.is_drawn(result):
                    training_view.draw(result, folder / _picture(result))
                else:
                    plot.draw(result, folder / _picture(result), match["role"])


def _is_drawn(result: record.Document, mark: re.Match[str]) -> bool:
    if mark["plot"] is None:
        return bool(plot.sweeps(result["rows"]))
    return training_view.is_drawn(result) or plot.pictured(result, mark["role"])


def _picture(result: record.Document) -> str:
    return f"benchmarks-{result['kind']}-{result['name']}.png"


def _block(result: record.Document, found: Mapping[str, Sequence[record.Document]], drawn: bool) -> str:
    """A caption, a table, where the time of the last row with stages, the largest size, went, and a picture."""
    if training_view.is_training(result):
        rows = training_view.cells(result, training_view.whole_run(result, found))
        shares = [f"{training_view.title(result)}."]
    else:
        rows = [_columns_of(row) for row in result["rows"]]
        shares = [_shares(row) for row in result["rows"] if row.get("stages")]
    picture = f"![{result['name']} on {result['kind']}]({_picture(result)})"
    return "\n\n".join([_caption(result), markdown(rows), *shares[-1:], *[picture] * drawn])


def _shares(row: Mapping[str, Any]) -> str:
    """The stages of a case as parts of its time; what a rank waits for counts where it waits."""
    total = sum(row["stages"].values()) or 1.0
    parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in row["stages"].items())
    tensor = f"{view.elements(row['numel'])} {row['dtype']}"
    return f"Where `{row['case']}` of {tensor} spends its time on rank 0: {parts}."


def _caption(result: record.Document) -> str:
    run, box, versions = result["run"], result["machine"], result["versions"]
    ranks = f"{run['ranks']} ranks, {run['backend']}, {run['link']}" if run["ranks"] > 1 else "one process"
    threads = run.get("threads", 1) if box["device"] == "cpu" else 1  # a result without it had one
    ranks += f", {threads} threads{' each' * (run['ranks'] > 1)}" * (threads > 1)
    times = f"{run['iterations']} rounds" if "iterations" in run else f"median of {run['repeats']} processes"
    packages = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "numba", "numpy"))
    priority = "" if run["priority"] == "normal" else f"; priority: {run['priority']}"
    device = f"{box['cpu']}, {box['cores']} cores" if box["device"] == "cpu" else box["device"]
    return f"{device}; {ranks}; {times}{priority}; {packages}; {result['created'][:10]}."


def _columns_of(row: Mapping[str, Any]) -> Cells:
    """A row of the documentation: ratios and counts, no times."""
    if "cache" in row:
        seconds = {name: value for name, value in row["seconds"].items() if not name.endswith("again")}
        return {"compile cache": row["cache"], **{f"{name}, s": f"{value:.2f}" for name, value in seconds.items()}}
    cells = {"case": f"`{row['case']}`", "tensor": f"{view.elements(row['numel'])} {row['dtype']}"}
    if row["wire_formula"] or row["wire_bytes"]:
        cells |= _wire(row)
    else:
        cells["bytes per element"] = f"{row['nbytes'] / row['numel']:.2f}"
    for role, spread in row["ratios"].items():
        cells[f"times {role}"] = f"**{spread['median']:.2f}** ({spread['low']:.2f} to {spread['high']:.2f})"
    return cells | {"#wrong": view.number(row["wrong"])}


def _wire(row: Mapping[str, Any]) -> Cells:
    """Bytes that one rank sends in one run."""
    cells = {"wire bytes, formula": view.number(row["wire_formula"] or None), "counted": view.number(row["wire_bytes"])}
    if row["link_bytes"] is not None:
        cells["on the link"] = view.number(row["link_bytes"])
    return cells


def markdown(rows: list[Cells]) -> str:
    """A table in Markdown."""
    names = view.columns(rows)
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the page is written; it may still hold sections that no result was found for, which is said."""
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.report", description=__doc__)
    flags.add_argument("--results", type=Path, default=record.default_folder(), help="folder of the JSON results")
    flags.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"), help="page to update")
    options = flags.parse_args(arguments)
    page = options.page.read_text(encoding="utf-8")
    found = newest(options.results)
    draw(page, found, options.page.parent)
    options.page.write_text(fill(page, found), encoding="utf-8")
    for name in (match["name"] for match in SECTION.finditer(page)):
        console.say(f"{name}: {len(found[name])} table(s)" if name in found else f"{name}: no result, left as it was")
    return 0


if __name__ == "__main__":
    sys.exit(main())
