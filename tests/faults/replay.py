"""One rank of a recorded run, alone: it gets again what it got then, and any of its collectives can be made to fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onebit.comm import Backend, run_threads
from onebit.comm.backend import Handle
from onebit.optim import CompressedOptimizer
from tests.faults.training import Moment

DIGEST = 32  # bytes; who sends so many compares facts, and ranks that agree all get the same
GARBAGE = 0x5A  # what a transport that has failed may leave where it should have written
OPERATIONS = ("_all_to_all", "_all_gather", "_all_reduce")


@dataclass
class Heard:
    """What came in one step, in the order in which it was asked for.

    Attributes:
        tensors: of collectives, but for those that compare facts or colors.
        colors: of all ranks of a group that is split.
    """

    tensors: list[Tensor] = field(default_factory=list)
    colors: list[list[int]] = field(default_factory=list)


@dataclass
class Recorded:
    """What one rank got and had in a run in which nothing went wrong.

    Attributes:
        tape: what came in each step.
        moments: what the rank had after each of 0 to all steps.
    """

    tape: list[Heard] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)


def record(
    make: Callable[[Backend], CompressedOptimizer],
    step: Callable[[CompressedOptimizer, int, int], None],
    world_size: int,
    steps: int,
) -> list[Recorded]:
    """Make an optimizer and so many steps on every rank; returns what each of them saw.

    Args:
        step: given the optimizer, the rank and the number of the step.
    """

    def train(backend: Backend) -> Recorded:
        seen, optimizer = Recorded(), make(backend)
        seen.moments.append(Moment.of(optimizer))
        _listen(backend, seen.tape)
        for number in range(steps):
            seen.tape.append(Heard())
            step(optimizer, backend.rank, number)
            seen.moments.append(Moment.of(optimizer))
        return seen

    return run_threads(world_size, train)


def _listen(backend: Any, tape: list[Heard]) -> None:
    """Have what comes through a backend and its parts written down from now on."""

    def recording(start: Callable[..., Handle]) -> Callable[..., Handle]:
        def started(output: Tensor, *inputs: Tensor) -> Handle:
            kept = torch.empty_like(output)
            if not _compares(inputs):
                tape[-1].tensors.append(kept)
            return _Kept(start(output, *inputs), output, kept)

        return started

    def colors(color: int) -> list[int]:
        found: list[int] = type(backend)._colors(backend, color)
        tape[-1].colors.append(found)
        return found

    def part(members: Sequence[int]) -> Backend:
        made: Backend = type(backend)._part(backend, members)
        _listen(made, tape)
        return made

    for operation in OPERATIONS:
        setattr(backend, operation, recording(getattr(backend, operation)))
    backend._colors, backend._part = colors, part


@dataclass
class _Kept:
    """A collective of which a copy is kept when it has come."""

    handle: Handle
    output: Tensor
    kept: Tensor

    def wait(self, timeout: float) -> None:
        self.handle.wait(timeout)
        self.kept.copy_(self.output)


class Failure(Exception):
    """What a transport raises."""


class Replay:
    """Plays a tape to a backend and its parts. Every start and every wait of a collective is an event, which may fail.

    Attributes:
        events: how many there were since `rewind`.
    """

    def __init__(self, tape: Sequence[Heard]) -> None:
        self._tape = tape
        self._coming = Heard()
        self._under_way: list[Tensor] = []
        self._fatal: int | None = None
        self._error: type[BaseException] = Failure
        self.events = 0

    def rewind(self, step: int, fatal: int | None, error: type[BaseException]) -> None:
        """From now on a step is made whose event number `fatal` fails; None: nothing fails."""
        self._coming = Heard(list(self._tape[step].tensors), list(self._tape[step].colors))
        self._under_way = []
        self._fatal, self._error = fatal, error
        self.events = 0

    def litter(self) -> None:
        """Write into everything that was to be written and has not come, as a transport that goes on would."""
        for output in self._under_way:
            output.view(torch.uint8).fill_(GARBAGE)

    def event(self) -> None:
        """Count one, and fail if it is the one that is to."""
        number, self.events = self.events, self.events + 1
        if number == self._fatal:
            self.litter()
            raise self._error

    def start(self, backend: Backend, output: Tensor, *inputs: Tensor) -> Handle:
        """Start what brought the next tensor of the tape, or a comparison of facts."""
        self._under_way.append(output)
        self.event()
        comes = inputs[0].repeat(backend.size) if _compares(inputs) else self._next(output.numel())
        return _Replayed(self, output, comes)

    def _next(self, numel: int) -> Tensor:
        """The next tensor of this size: what a first attempt has asked for once and for all is not asked for again."""
        tensors = self._coming.tensors
        while tensors[0].numel() != numel:
            tensors.pop(0)
        return tensors.pop(0)

    def take(self, output: Tensor, comes: Tensor) -> None:
        """Write what has come."""
        self.event()
        output.copy_(comes)
        self._under_way = [other for other in self._under_way if other is not output]

    def colors(self) -> list[int]:
        """The next colors of the tape."""
        self.event()
        return self._coming.colors.pop(0)


@dataclass
class _Replayed:
    replay: Replay
    output: Tensor
    comes: Tensor

    def wait(self, timeout: float) -> None:
        self.replay.take(self.output, self.comes)


class ReplayBackend(Backend):
    """A rank that is told what the others have sent."""

    name = "replay"
    device_type = "cpu"

    def __init__(self, rank: int, world_size: int, replay: Replay) -> None:
        super().__init__(rank, world_size)
        self._replay = replay

    def mend(self) -> None:
        """Be a new group, of which nothing has failed."""
        self._order.broken_by = None

    def _start(self, output: Tensor, *inputs: Tensor) -> Handle:
        return self._replay.start(self, output, *inputs)

    _all_to_all = _all_gather = _all_reduce = _start

    def _colors(self, color: int) -> list[int]:
        with self.guard("split"):
            return self._replay.colors()

    def _part(self, members: Sequence[int]) -> ReplayBackend:
        return ReplayBackend(members.index(self.rank), len(members), self._replay)

    def _barrier(self) -> None:
        raise NotImplementedError


def _compares(inputs: Sequence[Tensor]) -> bool:
    """Whether facts are compared, or colors, by a collective with these inputs."""
    return any((t.dtype, t.numel()) in ((torch.uint8, DIGEST), (torch.int64, 2)) for t in inputs)
