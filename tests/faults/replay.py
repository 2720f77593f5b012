"""One rank of a recorded run, alone: it gets again what it got then, and any of its collectives can be made to fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onebit.comm import Backend, run_threads
from onebit.comm.backend import Handle
from onebit.optim import CompressedOptimizer
from tests.faults.training import Moment

DIGEST = 32  # bytes; who sends so many compares facts, and ranks that agree all get the same
GARBAGE = 0x5A  # what a transport that has failed may leave where it should have written
OPERATIONS = ("_all_to_all", "_all_gather", "_all_reduce")

Tape = list[list[Tensor]]  # per step what came, in the order in which it was asked for


@dataclass
class Recorded:
    """What one rank got and had in a run in which nothing went wrong.

    Attributes:
        tape: what came in each step.
        moments: what the rank had after each of 0 to all steps.
    """

    tape: Tape = field(default_factory=list)
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
        for operation in OPERATIONS:
            setattr(backend, operation, _recording(getattr(backend, operation), seen.tape))
        for number in range(steps):
            seen.tape.append([])
            step(optimizer, backend.rank, number)
            seen.moments.append(Moment.of(optimizer))
        return seen

    return run_threads(world_size, train)


def _recording(start: Callable[..., Handle], tape: Tape) -> Callable[..., Handle]:
    def recording(output: Tensor, *inputs: Tensor) -> Handle:
        kept = torch.empty_like(output)
        if not (inputs and _compares_facts(inputs[0])):
            tape[-1].append(kept)
        return _Kept(start(output, *inputs), output, kept)

    return recording


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


class ReplayBackend(Backend):
    """A rank that is told what the others have sent. Every start and every wait of a collective is an event.

    Attributes:
        events: how many there were since `rewind`.
    """

    name = "replay"
    device_type = "cpu"

    def __init__(self, rank: int, world_size: int, tape: Tape) -> None:
        super().__init__(rank, world_size)
        self._tape = tape
        self._coming: list[Tensor] = []
        self._under_way: list[Tensor] = []
        self._fatal: int | None = None
        self._error: type[BaseException] = Failure
        self.events = 0

    def rewind(self, step: int, fatal: int | None, error: type[BaseException]) -> None:
        """Be a new group that makes a step, and whose event number `fatal` fails; None: nothing fails."""
        self._order.broken_by = None
        self._coming = list(self._tape[step])
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

    def take(self, output: Tensor, comes: Tensor) -> None:
        """Write what has come."""
        output.copy_(comes)
        self._under_way = [other for other in self._under_way if other is not output]

    def _start(self, output: Tensor, *inputs: Tensor) -> Handle:
        self._under_way.append(output)
        self.event()
        facts = bool(inputs) and _compares_facts(inputs[0])
        return _Replayed(self, output, inputs[0].repeat(self.size) if facts else self._coming.pop(0))

    _all_to_all = _all_gather = _all_reduce = _start

    def _barrier(self) -> None:
        raise NotImplementedError


@dataclass
class _Replayed:
    backend: ReplayBackend
    output: Tensor
    comes: Tensor

    def wait(self, timeout: float) -> None:
        self.backend.event()
        self.backend.take(self.output, self.comes)


def _compares_facts(input: Tensor) -> bool:
    return input.dtype == torch.uint8 and input.numel() == DIGEST
