"""`python -m onebit.benchmarks.report`: the tables and plots of docs/benchmarks.md and its pages, from the newest JSON.

A page marks where a table stands by a line ``<!-- results: NAME -->`` and a later line ``<!-- end -->``; what is
between them is replaced. NAME is the name of a result: ``kernels``, ``gloo-2``, ``net-1gbit``, ``first-call``. A result
of several sizes is also drawn, as is one whose mark ends in ``with plot`` or ``with plot of ROLE``, a yardstick. The
marks ``<!-- headlines: faster -->`` and ``<!-- headlines: slower -->`` stand for the two tables of the summary, and
``<!-- machines -->`` for one of the machines.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from onebit.benchmarks import console, headlines, machines_view, plot, record, training_view
from onebit.benchmarks.record import Document
from onebit.benchmarks.section import section
from onebit.benchmarks.view import markdown

RESULTS = re.compile(
    r"(?m)^<!-- results: (?P<name>\S+)(?P<plot> with plot(?: of (?P<role>\S+))?)? -->\n"
    r"(?:.*\n)*?<!-- end -->$"
)
HEADLINES = re.compile(r"(?m)^<!-- headlines: (?P<which>faster|slower) -->\n(?:.*\n)*?<!-- end -->$")
MACHINES = re.compile(r"(?m)^<!-- machines -->\n(?:.*\n)*?<!-- end -->$")
HEADING = re.compile(r"(?m)^#+ (?P<title>.+)$")

Found = Mapping[str, Sequence[Document]]


def newest(folder: Path) -> dict[str, list[Document]]:
    """For each name the newest result of each kind of machine, kinds in alphabetical order."""
    latest: dict[tuple[str, str], Document] = {}
    for path in record.paths(folder):
        result = record.load(path)
        key = (result["name"], result["kind"])
        if key not in latest or latest[key]["created"] < result["created"]:
            latest[key] = result
    found: dict[str, list[Document]] = {}
    for (name, _), result in sorted(latest.items(), key=lambda item: item[0]):
        found.setdefault(name, []).append(result)
    return found


def pages(home: Path) -> list[Path]:
    """`home`, and those of the folder of its name, in alphabetical order."""
    return [home, *sorted(home.with_suffix("").glob("*.md"))]


def places(texts: Mapping[str, str]) -> dict[str, str]:
    """For each name of a result a link to the heading that its mark stands below.

    texts: the pages' texts by their paths, relative to the page that has the links.
    """
    found = {}
    for path, text in texts.items():
        for match in RESULTS.finditer(text):
            titles = [heading["title"] for heading in HEADING.finditer(text, 0, match.start())]
            if titles:
                found[match["name"]] = f"[{titles[-1]}]({path}#{_anchor(titles[-1])})"
    return found


def _anchor(title: str) -> str:
    """What a heading is called in the address of a page, on GitHub as on the site."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


def fill(page: str, found: Found, links: Mapping[str, str] | None = None) -> str:
    """`page` with every marked table made anew; one without results keeps what it has.

    links: where the details of a result stand, for the summary.
    """

    def results(match: re.Match[str]) -> str:
        shown = [
            section(result, found, _picture(result) if _is_drawn(result, match) else None)
            for result in found.get(match["name"], ())
        ]
        return _between(match, "\n\n".join(shown))

    def summary(match: re.Match[str]) -> str:
        rows = headlines.lines(match["which"], found, links or {})
        return _between(match, markdown(rows, words=3) if rows else "")

    def machines(match: re.Match[str]) -> str:
        return _between(match, markdown(machines_view.cells(found), words=2) if found else "")

    return MACHINES.sub(machines, HEADLINES.sub(summary, RESULTS.sub(results, page)))


def _between(mark: re.Match[str], text: str) -> str:
    """A mark with `text` in the place of what it has; with what it has if there is none."""
    return "\n".join([mark[0].partition("\n")[0], text, "<!-- end -->"]) if text else mark[0]


def draw(page: str, found: Found, folder: Path) -> None:
    """Write the pictures that the marked sections of `page` show to `folder`."""
    for match in RESULTS.finditer(page):
        for result in found.get(match["name"], ()):
            if _is_drawn(result, match):
                if training_view.is_drawn(result):
                    training_view.draw(result, folder / _picture(result))
                else:
                    plot.draw(result, folder / _picture(result), match["role"])


def _is_drawn(result: Document, mark: re.Match[str]) -> bool:
    if mark["plot"] is None:
        return bool(plot.sweeps(result["rows"]))
    return training_view.is_drawn(result) or plot.pictured(result, mark["role"])


def _picture(result: Document) -> str:
    """The file that shows a result, beside its page."""
    return f"{result['kind']}-{result['name']}.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the pages are written; they may still hold sections that no result was found for, which is said."""
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.report", description=__doc__)
    flags.add_argument("--results", type=Path, default=record.default_folder(), help="folder of the JSON results")
    flags.add_argument(
        "--page", type=Path, default=Path("docs/benchmarks.md"), help="to update, with those in the folder of its name"
    )
    options = flags.parse_args(arguments)
    found = newest(options.results)
    texts = {path: path.read_text(encoding="utf-8") for path in pages(options.page)}
    links = places({path.relative_to(options.page.parent).as_posix(): text for path, text in texts.items()})
    filled = {path: fill(text, found, links) for path, text in texts.items()}
    for path, text in filled.items():
        draw(text, found, path.parent)
        path.write_text(text, encoding="utf-8")
        for name in (match["name"] for match in RESULTS.finditer(text)):
            tables = f"{len(found[name])} table(s)" if name in found else "no result, left as it was"
            console.say(f"{path.name}: {name}: {tables}")
    for name in sorted(found.keys() - links.keys()):
        console.say(f"{name}: on none of these pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
