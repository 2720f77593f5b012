"""`python -m tests.faults.report`: the tables of docs/reliability/evidence.md from the newest fault campaigns.

The page marks where a table stands by a line ``<!-- campaign: NAME -->`` and a later line ``<!-- end -->``; what is
between them is replaced. NAME is ``strikes``, ``bad numbers``, ``wrong calls`` or ``soak``. A campaign may have been
made in several parts, on several machines: of each kind of row the newest counts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onebit.benchmarks import console, record
from onebit.benchmarks.view import Cells, markdown

SECTION = re.compile(r"(?m)^<!-- campaign: (?P<name>[a-z ]+) -->\n(?:.*\n)*?<!-- end -->$")
PAGE = Path("docs/reliability/evidence.md")
KINDS = ("fault", "backend", "optimizer")  # what tells rows of a campaign apart

Found = tuple[record.Document, Mapping[str, Any]]


def newest(results: Iterable[record.Document], campaign: str) -> list[Found]:
    """The rows of a campaign with the result that each is of; of rows of one kind the newest."""
    latest: dict[tuple[str, ...], Found] = {}
    for result in sorted(results, key=lambda result: str(result["created"])):
        for row in result["rows"]:
            if row.get("campaign") == campaign:
                latest[tuple(row.get(kind, "") for kind in KINDS)] = (result, row)
    return [found for _, found in sorted(latest.items())]


def fill(page: str, results: Sequence[record.Document]) -> str:
    """`page` with every marked table made anew; one without results keeps what it has."""

    def section(match: re.Match[str]) -> str:
        found = newest(results, match["name"])
        if not found:
            return match[0]
        said = [f"- wrong: {_readable(line)}" for _, row in found for line in row["said"]]
        blocks = [match[0].partition("\n")[0], markdown(TABLES[match["name"]](found)), "\n".join(said), "<!-- end -->"]
        return "\n\n".join(filter(None, blocks))

    return SECTION.sub(section, page)


def _strikes(found: Sequence[Found]) -> list[Cells]:
    """One line per fault, backend and machine, the optimizers together."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for result, row in found:
        groups.setdefault((row["fault"], row["backend"], _machine(result)), []).append(row)
    lines = []
    for (fault, backend, machine), rows in groups.items():
        counts = {name: sum(row[name] for row in rows) for name in ("runs", "raised", "unharmed", "hangs", "corrupt")}
        latest = max(row["seconds_until_raised"]["max"] for row in rows)
        lines.append(
            {
                "fault": f"`{fault}`",
                "over": backend,
                "runs": str(counts["runs"]),
                "ranks that got an error": str(counts["raised"]),
                "after s, at most": f"{latest:.1f}" if counts["raised"] else "-",
                "ranks that went on": str(counts["unharmed"]),
                "hangs": str(counts["hangs"]),
                "damaged checkpoints": str(counts["corrupt"]),
                "#wrong": str(sum(row["wrong"] for row in rows)),
                "machine": machine,
            }
        )
    return lines


def _bad_numbers(found: Sequence[Found]) -> list[Cells]:
    return [
        {
            "runs": _number(row["runs"]),
            "bad numbers": _number(row["injections"]),
            "steps skipped": _number(row["skipped"]),
            "left out of local steps": _number(row["left_out"]),
            "runs equal to the bit": str(row["bit_equal"]),
            "within rounding": str(row["within_rounding"] + row["signs"]),
            "not comparable": str(row["cut"]),
            "diverged": str(row["diverged"]),
            "#wrong": str(row["wrong"]),
            "machine": _machine(result),
        }
        for result, row in found
    ]


def _wrong_calls(found: Sequence[Found]) -> list[Cells]:
    return [
        {
            "calls": _number(row["calls"]),
            "right after all": _number(row["right"]),
            "refused with": ", ".join(f"{name} {_number(count)}" for name, count in row["errors"].items()),
            "#wrong": str(row["wrong"]),
            "machine": _machine(result),
        }
        for result, row in found
    ]


def _soak(found: Sequence[Found]) -> list[Cells]:
    return [
        {
            "optimizer": f"`{row['optimizer']}`",
            "ranks": str(row["ranks"]),
            "steps": _number(row["steps"]),
            "memory grew by, KiB": "-" if row["memory_growth"] is None else _number(row["memory_growth"] // 1024),
            "largest feedback, times that of warm-up": str(row["feedback_growth"] or "-"),
            "#wrong": str(row["wrong"]),
            "machine": _machine(result),
        }
        for result, row in found
    ]


TABLES: Mapping[str, Callable[[Sequence[Found]], list[Cells]]] = {
    "strikes": _strikes,
    "bad numbers": _bad_numbers,
    "wrong calls": _wrong_calls,
    "soak": _soak,
}


def _machine(result: record.Document) -> str:
    return f"{result['kind']}, {result['created'][:10]}"


def _number(count: int) -> str:
    return f"{count:,}"


def _readable(line: str) -> str:
    """What a run says of itself is in the syntax of Python."""
    return " ".join(line.replace("Plan(", "").replace(")", "", 1).split())


def main() -> int:
    """0: the page is written."""
    results = [record.load(path) for path in record.paths(record.default_folder()) if "-torture" in path.name]
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    console.say(f"{PAGE}: {', '.join(sorted({row['campaign'] for result in results for row in result['rows']}))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
