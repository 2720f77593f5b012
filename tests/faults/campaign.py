"""The fault campaign: strikes, bad numbers, wrong calls and a soak; counts what came of them and writes JSON.

    python -m tests.faults.campaign --strikes 300 --injections 1000 --wrong-calls 10000 --soak 20000

Real processes over Gloo and MPI are killed, stopped and held up at random points; ranks as threads get numbers that are
not finite; public names get arguments that they must refuse; four processes make thousands of steps. The status is 1 if
anything was lost: a hang, ranks with different bits, a checkpoint that does not load, an error that is not documented,
memory that grows. `make torture` runs it.

The result is written again after each part, and each optimizer's soak, so a campaign that is cut off keeps what it has.
A campaign of some parts alone is named after them, and so replaces no other. A core makes about 150 wrong calls a
second; a step of 4 ranks takes up to 3 ms of each of their cores; from 12 jobs on three optimizers soak side by side:

    python -m tests.faults.campaign --strikes 0 --injections 0 --wrong-calls 10000 --soak 20000 --jobs 16 \
        --output benchmarks/results
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onebit.benchmarks import console, record
from tests.comm.launcher import mpi_survives, mpiexec
from tests.faults.crew import crew, shares
from tests.faults.endure import FAULTS
from tests.faults.soak import soak_all
from tests.faults.spoil import Tally, spoiled
from tests.faults.strikes import LIMIT, strike_all
from tests.faults.training import MAKERS
from tests.faults.wrong_calls import Tally as Answers
from tests.faults.wrong_calls import wrong_calls

Row = dict[str, Any]
SOAK_RANKS = 4
JOBS = max(len(os.sched_getaffinity(0)) // 4, 1)  # two ranks wait for each other, their launcher for both


def _strikes(options: argparse.Namespace) -> Iterator[list[Row]]:
    kinds = options.backends.split(",")
    if "mpi" in kinds and (mpiexec() is None or find_spec("mpi4py") is None):
        console.say("there is no mpi4py or no mpiexec here: nothing is struck over MPI", stderr=True)
        kinds.remove("mpi")
    if "mpi" in kinds and not mpi_survives():
        console.say(
            "this mpiexec ends the whole job with a rank that is killed: nothing is killed over MPI", stderr=True
        )
    tallies = {}
    if kinds:
        # Ctrl-C ends the strikes, and what was counted until then is kept.
        with contextlib.suppress(KeyboardInterrupt), console.progress_bar(options.strikes) as tell:
            struck = strike_all(
                kinds,
                options.strikes,
                options.seed,
                options.ranks,
                options.limit,
                options.jobs,
                options.faults.split(","),
            )
            for tallies in struck:
                tell(f"{sum(tally.wrong for tally in tallies.values())} wrong")
    yield [
        {"campaign": "strikes", "backend": kind, "optimizer": name, "fault": fault, **tally.row(), "said": tally.said}
        for (kind, name, fault), tally in sorted(tallies.items())
    ]


def _bad_numbers(options: argparse.Namespace) -> Iterator[list[Row]]:
    total = Tally()
    for tally in _shared_out(spoiled, options.injections, options):
        total.take_in(tally)
    yield [{"campaign": "bad numbers", "backend": "threads", **total.row(), "said": total.said}]


def _wrong_calls(options: argparse.Namespace) -> Iterator[list[Row]]:
    total = Answers()
    for tally in _shared_out(wrong_calls, options.wrong_calls, options):
        total.take_in(tally)
    yield [{"campaign": "wrong calls", "backend": "threads", **total.row()}]


def _soak(options: argparse.Namespace) -> Iterator[list[Row]]:
    rows: list[Row] = []
    with crew(max(options.jobs // SOAK_RANKS, 1)) as workers:
        made = [workers.submit(soak_all, name, SOAK_RANKS, options.soak) for name in MAKERS]
        for one in as_completed(made):
            rows.append(one.result())
            yield rows


# By the option that says how much of it: what yields the rows that there are so far.
PARTS: Mapping[str, Callable[[argparse.Namespace], Iterator[list[Row]]]] = {
    "strikes": _strikes,
    "injections": _bad_numbers,
    "wrong_calls": _wrong_calls,
    "soak": _soak,
}


def _shared_out(work: Callable[[int, int], Any], total: int, options: argparse.Namespace) -> Iterator[Any]:
    """Yield ``work(share, seed)`` of every worker as it comes; the shares sum to `total`."""
    parts = shares(total, options.jobs)
    with crew(options.jobs) as workers:
        made = [workers.submit(work, part, options.seed * 1000 + i) for i, part in enumerate(parts)]
        for one in as_completed(made):
            yield one.result()


def _cells(row: Row) -> dict[str, str]:
    """What a table shows of a row: its plain values, and the largest of what has one."""
    shown = {name: str(value) for name, value in row.items() if isinstance(value, (str, int, float))}
    most = {f"{name}, at most": str(value["max"]) for name, value in row.items() if "max" in _mapping(value)}
    return {**shown, **most, "#wrong": shown["wrong"]}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _show(rows: Sequence[Row]) -> None:
    for campaign in dict.fromkeys(row["campaign"] for row in rows):
        cells = [_cells(row) for row in rows if row["campaign"] == campaign]
        columns = [name for name in cells[0] if name not in ("campaign", "wrong")]
        console.show_table(campaign, columns, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing was lost; 1: something was, as the messages tell."""
    flags = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__.splitlines()[0])
    flags.add_argument("--strikes", type=int, default=48, help="processes to kill, stop or hold up")
    flags.add_argument("--injections", type=int, default=1000, help="numbers that are not finite")
    flags.add_argument("--wrong-calls", type=int, default=0, help="calls that must be refused")
    flags.add_argument("--soak", type=int, default=0, help="compressed steps of each optimizer on four ranks")
    flags.add_argument("--backends", default="gloo,mpi", help="what carries the runs that are struck")
    flags.add_argument("--faults", default=",".join(FAULTS), help="how they are struck")
    flags.add_argument("--ranks", type=int, default=2, help="processes of a run that is struck")
    flags.add_argument("--limit", type=float, default=LIMIT, help="seconds that one collective may take in it")
    flags.add_argument("--jobs", type=int, default=JOBS, help="how much is done side by side; a strike takes its ranks")
    flags.add_argument("--seed", type=int, default=0, help="another one, another campaign")
    flags.add_argument("--output", type=Path, help="folder for the JSON result (none: no JSON)")
    options = flags.parse_args(arguments)
    os.environ.setdefault("ONEBIT_NUM_THREADS", "1")  # ranks side by side would wait for each other's threads
    asked = [name for name in PARTS if getattr(options, name)]
    name = "-".join(["torture", *([] if len(asked) == len(PARTS) else asked)]).replace("_", "-")
    settings = {name: value for name, value in vars(options).items() if name not in ("backends", "output")}
    rows: list[Row] = []
    for part in asked:
        before = rows
        for made in PARTS[part](options):
            rows = [*before, *made]
            result = record.make(name, {"backend": options.backends, "link": "this machine", **settings}, rows)
            if options.output:
                console.say(f"JSON with {part}: {record.save(result, options.output)}")
    _show(rows)
    for row in rows:
        for said in row["said"]:
            console.say(f"wrong: {row['campaign']}: {said}", stderr=True)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
