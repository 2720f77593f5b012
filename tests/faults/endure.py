"""What one rank does in a run that a fault strikes: trains, is struck or survives, and says what it has then."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from onebit.comm import Backend, TransportError
from onebit.comm.backend import Handle
from onebit.optim import CompressedOptimizer
from tests.faults.training import STEPS, Moment, give_gradients, load, make, save, undisturbed

FAULTS = ("kill", "stop", "late", "pause")
AFTER = 7  # steps that would follow that of the fault, more than an interval of 0/1 Adam has
CALLS = 24  # starts and waits; a step of all buckets has 16, and 24 where ranks have to agree first
CHECKPOINT = "checkpoint"
PATIENCE = 15.0  # seconds that a rank stays for the others to have said what they saw


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run and its fault.

    Attributes:
        kind: ``"gloo"`` or ``"mpi"``.
        optimizer: its name.
        fault: ``"kill"``: SIGKILL; ``"stop"``: SIGSTOP for good; ``"late"``: SIGSTOP, and SIGCONT once the others have
            given up; ``"pause"``: SIGSTOP, and SIGCONT well within the time limit.
        victim: the rank that it strikes.
        step: in which step it strikes.
        saving: it strikes while the checkpoint after that step is written, else in the step itself.
        moment: how far into it, in times of what it took the last time.
        call: None: at that moment. Else right before so many starts and waits of collectives have been made, counted
            from the step's begin.
        limit: seconds that one collective may take.
        folder: for checkpoints and what ranks tell each other.
    """

    kind: str
    world_size: int
    optimizer: str
    fault: str
    victim: int
    step: int
    saving: bool
    moment: float
    call: int | None
    limit: float
    folder: str = field(repr=False)

    @staticmethod
    def draw(
        random: random.Random, *, kind: str, optimizer: str, fault: str, world_size: int, limit: float, folder: str
    ) -> Plan:
        """A random victim, step and moment, or call."""
        call = random.randrange(CALLS) if random.random() < 0.5 else None
        return Plan(
            kind=kind,
            world_size=world_size,
            optimizer=optimizer,
            fault=fault,
            victim=random.randrange(world_size),
            step=random.randrange(STEPS - AFTER),
            saving=call is None and random.random() < 0.4,
            moment=random.random(),
            call=call,
            limit=limit,
            folder=folder,
        )


@dataclass
class Report:
    """What one rank saw.

    Attributes:
        made: steps that it has made.
        operation, waited: of the error that it got; None: it got none.
        raised_at: when, on the clock that all processes of a machine share.
        wrong: what should not have been.
    """

    made: int = 0
    operation: str | None = None
    waited: float = 0.0
    raised_at: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    def expect_fit(self, now: Moment, expected: Moment, what: str) -> None:
        """Expect that `misfits` finds nothing."""
        misfits = now.misfits(expected)
        self.expect(not misfits, f"{what}: {'; '.join(misfits)}")


def endure(backend: Backend, plan: Plan) -> Report:
    """Train, with the fault; then check what is left against the run without one. For `run_ranks`."""
    expected = undisturbed(plan.optimizer, plan.world_size)  # which also loads all kernels
    own = expected[backend.rank]
    optimizer = make(plan.optimizer, backend)
    folder = Path(plan.folder)
    report = Report()
    backend.barrier()
    backend.timeout = plan.limit
    try:
        _train(optimizer, backend, plan, folder / CHECKPOINT)
    except TransportError as error:
        report.operation, report.waited, report.raised_at = error.operation, error.waited, time.monotonic()
        report.expect(error.rank == backend.rank, f"the error names rank {error.rank}")
    report.made = optimizer.param_groups[0]["step"]
    now = Moment.of(optimizer)
    if report.operation is None:
        report.expect(report.made == STEPS and now.equals(own[STEPS]), "it ended with other bits than without a fault")
    else:
        where = f"after the error of {report.operation} rank {backend.rank}"
        report.expect_fit(now, own[report.made], f"{where} is not as after {report.made} steps")
        _try_again(optimizer, backend, own[report.made], report)
    _save_and_load(optimizer, backend, plan, folder / "afterwards", report)
    _meet(plan, backend.rank, folder)
    if backend.rank == min(set(range(plan.world_size)) - {plan.victim}):
        _check_checkpoints(backend, plan, folder, expected, report)
    return report


def _train(optimizer: CompressedOptimizer, backend: Backend, plan: Plan, folder: Path) -> None:
    took = {False: 0.0, True: 0.0}
    strike: Strike | None = None
    for number in range(STEPS):
        if strike is not None and number == STEPS - AFTER:
            strike.due = (
                False  # it waits for longer than this step takes, and soon nobody would need this rank any more
            )
        give_gradients(optimizer, backend.rank, number)
        for saving in (False, True):
            start = time.monotonic()
            if (number, saving, backend.rank) == (plan.step, plan.saving, plan.victim):
                strike = Strike(plan, plan.moment * took[saving])
                if plan.call is None:
                    strike.start()
                else:
                    strike_before(backend, plan.call, strike)
            if saving:
                save(optimizer, folder)
            else:
                optimizer.step()
            took[saving] = time.monotonic() - start


def _try_again(optimizer: CompressedOptimizer, backend: Backend, expected: Moment, report: Report) -> None:
    """Whoever tries the step again gets an error again, soon, and nothing changes."""
    steps = 5  # local steps of 0/1 Adam need no other rank
    again = None
    start = time.monotonic()
    for number in range(steps):
        before = optimizer.param_groups[0]["step"]
        give_gradients(optimizer, backend.rank, number)
        try:
            optimizer.step()
        except TransportError as error:
            again = error
            break
        report.expect(before < optimizer.param_groups[0]["step"], "a further step was neither made nor refused")
    report.expect(again is not None, "it could go on after the error")
    report.expect(time.monotonic() - start < backend.timeout, "the second error took long")
    if optimizer.param_groups[0]["step"] == report.made:
        report.expect_fit(Moment.of(optimizer), expected, f"trying again changed something on rank {backend.rank}")


def _save_and_load(optimizer: CompressedOptimizer, backend: Backend, plan: Plan, folder: Path, report: Report) -> None:
    loaded = load(plan.optimizer, backend, save(optimizer, folder))
    report.expect(Moment.of(loaded).equals(Moment.of(optimizer)), "what it saved does not load to the same bits")


def _check_checkpoints(
    backend: Backend, plan: Plan, folder: Path, expected: list[list[Moment]], report: Report
) -> None:
    """The last checkpoint of every rank, the victim's included, is whole, whenever it was struck."""
    for rank, moments in enumerate(expected):
        path = folder / CHECKPOINT / f"rank-{rank:05d}-of-{len(expected):05d}.pt"
        if not path.exists():  # it was struck before it had written one
            continue
        try:
            loaded = load(plan.optimizer, _as_rank(backend, rank), path)
            made = loaded.param_groups[0]["step"]
            report.expect(Moment.of(loaded).equals(moments[made]), f"corrupt: the checkpoint of rank {rank} is another")
        except Exception as error:
            report.wrong.append(f"corrupt: the checkpoint of rank {rank} does not load: {error!r}")


def _as_rank(backend: Backend, rank: int) -> Backend:
    """Something that says that it is another rank of the group, for who wants to look at that rank's state."""
    from copy import copy

    other = copy(backend)
    other.rank = rank
    return other


def _meet(plan: Plan, rank: int, folder: Path) -> None:
    """Stay until the others are through: over MPI the first to end would take them along."""
    (folder / f"through.{rank}").touch()
    others = set(range(plan.world_size)) - ({plan.victim} if plan.fault in ("kill", "stop") else set())
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not all((folder / f"through.{other}").exists() for other in others):
        time.sleep(0.02)


def strike_before(backend: Backend, call: int, strike: Strike) -> None:
    """Have the process struck right before one of the starts and waits of collectives that follow."""
    calls = iter(range(call + 1))

    def count() -> None:
        if next(calls, None) == call:
            strike.now()

    @dataclass
    class Counted:
        handle: Handle

        def wait(self, timeout: float) -> None:
            count()
            self.handle.wait(timeout)

    def counting(start: Callable[[Tensor, Tensor], Handle | None]) -> Callable[[Tensor, Tensor], Handle | None]:
        def counted(output: Tensor, input: Tensor) -> Handle | None:
            count()
            handle = start(output, input)
            return None if handle is None else Counted(handle)

        return counted

    for operation in ("_all_to_all", "_all_gather"):
        setattr(backend, operation, counting(getattr(backend, operation)))


class Strike(threading.Thread):
    """Strikes its own process after a delay, wherever the main thread is then, and leaves word of where that was.

    Args:
        plan: says how.
        delay: seconds after `start`.

    Attributes:
        due: set it False, and what has not struck yet never will.
    """

    due = True

    def __init__(self, plan: Plan, delay: float) -> None:
        super().__init__(daemon=True)
        self._plan = plan
        self._delay = delay
        self._main = threading.main_thread().ident
        self._word = os.open(Path(plan.folder) / "struck", os.O_WRONLY | os.O_CREAT)

    def run(self) -> None:
        sys.setswitchinterval(1e-4)  # seconds; the default is longer than a step
        self._wake_later(self._delay)
        time.sleep(self._delay)
        self._strike()

    def now(self) -> None:
        """Strike where the caller is, which is the main thread."""
        self._wake_later(0.0)
        self._strike()

    def _strike(self) -> None:
        if not self.due:
            return
        os.write(self._word, f"{time.monotonic()} {self._where()}".encode())
        os.kill(os.getpid(), signal.SIGKILL if self._plan.fault == "kill" else signal.SIGSTOP)

    def _wake_later(self, delay: float) -> None:
        """Have it go on some time after a strike in `delay` seconds: a stopped process cannot wake itself."""
        away = {"late": 2.5 * self._plan.limit, "pause": 0.3 * self._plan.limit}.get(self._plan.fault)
        if away is not None:
            command = f"sleep {away + delay}; kill -CONT {os.getpid()}"
            subprocess.Popen(["/bin/sh", "-c", command], close_fds=True)

    def _where(self) -> str:
        """The innermost function of the library that the main thread is in."""
        assert self._main is not None
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("onebit."):
                return f"{module}.{frame.f_code.co_qualname}" if hasattr(frame.f_code, "co_qualname") else module
            frame = frame.f_back
        return "between steps"


def struck(folder: str) -> tuple[float, str] | None:
    """When and where the victim was struck; None: it was not."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        when, where = (Path(folder) / "struck").read_text().split(" ", 1)
        return float(when), where
    return None
