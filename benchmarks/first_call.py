"""What the first call of each kernel costs: compiled anew with an empty cache, then loaded from the cache on disk.

Each measurement is a fresh process, since a process compiles or loads a kernel once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onebit.benchmarks import console, record

PROGRAM = Path(__file__).with_name("cold_start.py")
Times = dict[str, float]


def _in_fresh_process(cache: Path) -> Times:
    """What `cold_start` measures in a new process that keeps compiled code in `cache`."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": f"{cache}"}
    # As text: Python would put the folder of a file first on its path, and our modules before others of their names.
    command = [sys.executable, "-c", PROGRAM.read_text(encoding="utf-8")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    times: Times = json.loads(done.stdout)
    return times


def _compare(repeats: int) -> list[dict[str, object]]:
    """One row per state of the cache, ``"empty"`` and ``"warm"``, each call the median of `repeats` processes."""
    seen: dict[str, list[Times]] = {"empty": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="onebit-") as folder:
            for state in seen:
                seen[state].append(_in_fresh_process(Path(folder)))
    return [{"cache": state, "seconds": _medians(times)} for state, times in seen.items()]


def _medians(times: Sequence[Times]) -> Times:
    return {name: sorted(entry[name] for entry in times)[len(times) // 2] for name in times[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured; 1: a kernel failed, as the messages of its process tell."""
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.first_call", description=__doc__)
    flags.add_argument("--repeats", type=int, default=3, help="processes for each state of the cache")
    flags.add_argument("--output", type=Path, help="folder for the JSON result (none: no JSON)")
    options = flags.parse_args(arguments)
    run = {"ranks": 1, "backend": "single", "link": "this machine", "repeats": options.repeats}
    try:
        rows = _compare(options.repeats)
    except subprocess.CalledProcessError as error:
        console.say(f"a fresh process ended with status {error.returncode}; its messages stand above", stderr=True)
        return 1
    result = record.make("first-call", run, rows)
    _show(result)
    if options.output:
        console.say(f"JSON: {record.save(result, options.output)}")
    return 0


def _show(result: record.Document) -> None:
    rows = [{"cache": row["cache"], **_cells(row["seconds"])} for row in result["rows"]]
    console.show_table("first call of each kernel in a fresh process, seconds", list(rows[0]), rows)


def _cells(seconds: Times) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in seconds.items() if not name.endswith("again")}


if __name__ == "__main__":
    sys.exit(main())
