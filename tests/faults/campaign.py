"""The fault campaign: strikes at hundreds of runs, thousands of bad numbers; counts what came of them, writes JSON.

    python -m tests.faults.campaign --strikes 300 --injections 1000 --output benchmarks/results      (make torture)

Real processes over Gloo and MPI are killed, stopped and held up at random points; ranks as threads get numbers that are
not finite. The status is 1 if anything was lost: a hang, ranks with different bits, a checkpoint that does not load.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from onebit.benchmarks import console, record
from tests.comm.launcher import mpiexec
from tests.faults.spoil import Tally, spoil_all
from tests.faults.strikes import LIMIT, Strikes, strike_all


def _strike(kinds: Sequence[str], runs: int, options: argparse.Namespace) -> dict[tuple[str, str, str], Strikes]:
    tallies: dict[tuple[str, str, str], Strikes] = {}
    # Ctrl-C ends the strikes, and what was counted until then is kept.
    with contextlib.suppress(KeyboardInterrupt), console.progress_bar(runs) as tell:
        for tallies in strike_all(kinds, runs, options.seed, options.ranks, options.limit):
            tell(f"{sum(tally.wrong for tally in tallies.values())} wrong")
    return tallies


def _spoil(injections: int, seed: int) -> Tally:
    logging.getLogger("onebit").setLevel(logging.ERROR)  # else every skipped step is told
    torch.set_num_threads(1)
    return [Tally(), *spoil_all(injections, seed)][-1]


def _rows(tallies: Mapping[tuple[str, str, str], Strikes], spoiled: Tally) -> list[dict[str, Any]]:
    rows = [
        {"campaign": "strikes", "backend": kind, "optimizer": optimizer, "fault": fault, **tally.row()}
        for (kind, optimizer, fault), tally in sorted(tallies.items())
    ]
    return [*rows, {"campaign": "bad numbers", "backend": "threads", **spoiled.row()}]


def _show(result: record.Document) -> None:
    strikes = [row for row in result["rows"] if row["campaign"] == "strikes"]
    if strikes:
        shown = ("backend", "optimizer", "fault", "runs", "raised", "unharmed", "hangs", "corrupt")
        rows = [
            {name: str(row[name]) for name in shown}
            | {"seconds, at most": f"{row['seconds_until_raised']['max']:.1f}", "#wrong": str(row["wrong"])}
            for row in strikes
        ]
        console.show_table("strikes at real processes", list(rows[0]), rows)
    spoiled = {name: str(value) for name, value in result["rows"][-1].items() if isinstance(value, int)}
    console.show_table("numbers that are not finite", list(spoiled), [spoiled])


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing was lost; 1: something was, as the messages tell."""
    flags = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__.splitlines()[0])
    flags.add_argument("--strikes", type=int, default=48, help="processes to kill, stop or hold up")
    flags.add_argument("--injections", type=int, default=1000, help="numbers that are not finite")
    flags.add_argument("--backends", default="gloo,mpi", help="what carries the runs that are struck")
    flags.add_argument("--ranks", type=int, default=2, help="processes of a run")
    flags.add_argument("--limit", type=float, default=LIMIT, help="seconds that one collective may take")
    flags.add_argument("--seed", type=int, default=0, help="another one, another campaign")
    flags.add_argument("--output", type=Path, help="folder for the JSON result (none: no JSON)")
    options = flags.parse_args(arguments)
    kinds = options.backends.split(",")
    if "mpi" in kinds and (mpiexec() is None or find_spec("mpi4py") is None):
        console.say("there is no mpi4py or no mpiexec here: nothing is struck over MPI", stderr=True)
        kinds.remove("mpi")
    tallies = _strike(kinds, options.strikes, options) if kinds else {}
    spoiled = _spoil(options.injections, options.seed)
    run = {"ranks": options.ranks, "backend": "+".join(kinds), "link": "this machine"}
    run |= {"strikes": options.strikes, "injections": options.injections, "seed": options.seed, "limit": options.limit}
    result = record.make("torture", run, _rows(tallies, spoiled))
    _show(result)
    if options.output:
        console.say(f"JSON: {record.save(result, options.output)}")
    for said in [said for tally in (*tallies.values(), spoiled) for said in tally.said]:
        console.say(f"wrong: {said}", stderr=True)
    return 1 if record.wrong(result) else 0


if __name__ == "__main__":
    sys.exit(main())
