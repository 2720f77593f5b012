"""The JSON document of one run: what was measured, on what, with which versions, and whether it was right."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onebit.benchmarks import machine
from onebit.benchmarks.row import Row

SCHEMA = 1
CHECKOUT = Path("benchmarks/results")
ELSEWHERE = Path("benchmark-results")

Document = dict[str, Any]


def default_folder() -> Path:
    """`benchmarks/results` in a checkout, else `benchmark-results`, in the current folder."""
    return CHECKOUT if (CHECKOUT.parent / "driver.py").is_file() else ELSEWHERE


def make(name: str, run: Mapping[str, object], rows: Sequence[Mapping[str, object]], device: str = "cpu") -> Document:
    """The document of one run.

    name: ``"kernels"``, ``"gloo-2"``, ``"net-1gbit"``, ...; run: how it ran (ranks, backend, link, threads, counts);
    device: ``"cpu"`` or ``"cuda"``.
    """
    return {
        "schema": SCHEMA,
        "name": name,
        "kind": machine.kind(device),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "run": {**run, "priority": machine.priority()},
        "rows": [dict(row) for row in rows],
    }


def row_fields(row: Row) -> dict[str, object]:
    """A row as it stands in the document."""
    time = row.time
    return asdict(row) | {"time": {"min": time.low, "median": time.median, "p99": time.high}}


def wrong(result: Document) -> int:
    """Wrong elements in all rows."""
    return sum(row.get("wrong") or 0 for row in result["rows"])


def save(result: Document, folder: Path) -> Path:
    """Write `result` to ``<folder>/<machine kind>-<name>-<date>.json`` and return that path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['kind']}-{result['name']}-{result['created'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def paths(given: Path) -> list[Path]:
    """The results of this package in a folder, in the order of their names; or the one file that is given."""
    if not given.is_dir():
        return [given]
    return [path for path in sorted(given.glob("*.json")) if "schema" in json.loads(path.read_text(encoding="utf-8"))]


def load(path: Path) -> Document:
    """Read a document.

    Raises:
        ValueError: it is of another schema.
    """
    result: Document = json.loads(path.read_text(encoding="utf-8"))
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} has schema {result.get('schema')!r}, this version reads {SCHEMA}")
    return result
