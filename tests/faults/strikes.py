"""Strikes at real processes, one run each, and the count of what came of them."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import cycle, islice, product
from typing import Any

from tests.comm.launcher import SURVIVING, RanksFailed, mpi_survives, run_ranks
from tests.faults.crew import crew
from tests.faults.endure import FAULTS, Plan, Report, endure, struck
from tests.faults.training import MAKERS

LIMIT = 1.5  # seconds that one collective may take
SLACK = 10.0  # seconds that a busy machine may be late
HANG = 90.0  # seconds after which a run is killed and counted as a hang


@dataclass
class Strikes:
    """What came of all strikes of one kind on one optimizer over one backend.

    Attributes:
        runs: strikes.
        survivors: ranks that were left to tell; of a victim that was stopped and went on its own word counts too.
        raised: how many of these got a TransportError, `seconds` after the strike; in the last collective they had
            waited for `waits` seconds, while the rest went into what they did before, such as writing a checkpoint.
        unharmed: how many made all steps, with the bits of a run without a strike.
        hangs: runs that had not ended after 90 s.
        corrupt: checkpoints that did not load, or not to what the rank had when it wrote them.
        wrong: everything that should not have been, hangs and corrupt checkpoints included, as `said`.
        slow: runs that do not count, for a rank was later than the time limit by itself.
        places: where the victims were, and how often.
    """

    runs: int = 0
    survivors: int = 0
    raised: int = 0
    unharmed: int = 0
    hangs: int = 0
    corrupt: int = 0
    wrong: int = 0
    slow: int = 0
    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    places: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    def count(self, plan: Plan, reports: Sequence[Report], failure: str | None) -> None:
        """Take one run in.

        Args:
            plan: how it was made.
            reports: of the ranks that had something to tell.
            failure: why others had not.
        """
        when, where = struck(plan.folder) or (None, "never")
        raised = [report for report in reports if report.operation is not None]
        too_early = when is None or any(report.raised_at < when for report in raised)
        too_slow = plan.fault == "pause" and any(report.waited >= plan.limit for report in raised)
        if failure is None and (too_early or too_slow):
            self.slow += 1
            return
        found = [said for report in reports for said in report.wrong]
        seconds = [report.raised_at - (when or 0.0) for report in raised]
        if plan.fault == "pause":
            found += ["it raised although the pause was short"] * len(raised)
        else:
            found += ["it did not raise"] * (len(reports) - len(raised))
        longest = plan.limit * (3.5 if plan.fault == "late" else 1.0) + SLACK  # the late one is away for 2.5 limits
        found += [f"it raised after {s:.1f} s" for s in seconds if s > longest]
        if failure is not None:
            found.append(failure)
            self.hangs += "still running" in failure
        self.runs += 1
        self.survivors += len(reports)
        self.raised += len(raised)
        self.unharmed += len(reports) - len(raised)
        self.seconds += seconds
        self.waits += [report.waited for report in raised]
        self.corrupt += sum(said.startswith("corrupt") for said in found)
        self.wrong += len(found)
        self.places[where] += 1
        self.said += [f"{plan}: {said}" for said in found]

    def row(self) -> dict[str, Any]:
        """The counts as they stand in a result."""
        ordered = sorted(self.seconds) or [0.0]
        counts = ("runs", "survivors", "raised", "unharmed", "hangs", "corrupt", "wrong", "slow")
        return {
            **{name: getattr(self, name) for name in counts},
            "seconds_until_raised": {"median": round(ordered[len(ordered) // 2], 3), "max": round(ordered[-1], 3)},
            "longest_wait": round(max(self.waits, default=0.0), 3),
            "places": dict(self.places.most_common()),
        }


def strike(plan: Plan) -> tuple[list[Report], str | None]:
    """Make one run; returns what its ranks tell, and what the launcher says if a rank that should have told did not."""
    without = [plan.victim] if plan.fault in ("kill", "stop") else []
    flags = SURVIVING if plan.fault == "kill" else ()
    try:
        reports = run_ranks(
            plan.kind, plan.world_size, endure, plan, timeout=HANG, without=without, mpiexec_flags=flags
        )
    except RanksFailed as failed:
        return [], str(failed)
    return [report for report in reports if report is not None], None


def strike_all(
    kinds: Sequence[str],
    runs: int,
    seed: int,
    world_size: int = 2,
    limit: float = LIMIT,
    jobs: int = 1,
    faults: Sequence[str] = FAULTS,
) -> Iterator[dict[tuple[str, str, str], Strikes]]:
    """Make `runs` runs that count, `jobs` at a time, with every backend, fault and optimizer in turn.

    Nobody is killed over MPI where that ends the whole job. Yields the counts after each.
    """
    dice = random.Random(seed)
    tallies: dict[tuple[str, str, str], Strikes] = {}
    possible = [turn for turn in product(faults, MAKERS, kinds) if turn[::2] != ("kill", "mpi") or mpi_survives()]
    turns = cycle(possible)
    under_way: dict[Future[tuple[list[Report], str | None]], Plan] = {}
    with tempfile.TemporaryDirectory(prefix="onebit-faults-") as place, crew(jobs) as workers:
        while lacking := runs - sum(tally.runs for tally in tallies.values()):
            for fault, optimizer, kind in islice(turns, min(jobs, lacking) - len(under_way)):
                plan = Plan.draw(
                    dice,
                    kind=kind,
                    optimizer=optimizer,
                    fault=fault,
                    world_size=world_size,
                    limit=limit,
                    folder=tempfile.mkdtemp(dir=place),
                )
                under_way[workers.submit(strike, plan)] = plan
            for ended in wait(under_way, return_when=FIRST_COMPLETED).done:
                plan = under_way.pop(ended)
                tally = tallies.setdefault((plan.kind, plan.optimizer, plan.fault), Strikes())
                tally.count(plan, *ended.result())
                shutil.rmtree(plan.folder)
                yield tallies
