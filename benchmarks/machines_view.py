"""The machines that results come from, as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onebit.benchmarks.record import Document
from onebit.benchmarks.view import Cells


def cells(found: Mapping[str, Sequence[Document]]) -> list[Cells]:
    """A row for each kind of machine; where machines of a kind differ, a cell lists what they have.

    found: results by name.
    """
    kinds: dict[str, list[Document]] = {}
    for result in (result for results in found.values() for result in results):
        kinds.setdefault(result["kind"], []).append(result)
    return [_line(kind, results) for kind, results in sorted(kinds.items())]


def _line(kind: str, results: Sequence[Document]) -> Cells:
    machines = [result["machine"] for result in results]
    devices = {box["device"] for box in machines} - {"cpu"}
    return {
        "kind": f"`{kind}`",
        "processors": ", ".join(sorted({box["cpu"] for box in machines} | devices)),
        "cores": _numbers({box["cores"] for box in machines}),
        "memory, GiB": _numbers({box["memory_gib"] for box in machines}),
        "results": str(len(results)),
    }


def _numbers(values: set[int]) -> str:
    return ", ".join(str(value) for value in sorted(values))
