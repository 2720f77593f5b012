"""Ranks as threads of one process: for tests and notebooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from onebit.comm.backend import Backend, Handle
from onebit.comm.errors import BackendError

Result = TypeVar("Result")


def run_threads(world_size: int, function: Callable[..., Result], *args: object, timeout: float = 60.0) -> list[Result]:
    """Call ``function(backend, *args)`` on `world_size` threads, each with its own rank; returns their results by rank.

    Inside, `make_backend(None)` is the thread's own backend. All ranks share this process's random generator; autocast
    and gradient modes start as in any new thread.

    Args:
        timeout: seconds that one collective may take; the whole may take any time.

    Raises:
        BackendError: `world_size` is less than 1.
        BaseException: what the ranks raised: the error of the lowest rank that failed by itself and not because another
            rank had; notes tell its rank and the other ranks' errors.
    """
    if world_size < 1:
        raise BackendError(f"world_size must be at least 1, got {world_size}")
    meeting = _Meeting(world_size)
    backends = [ThreadsBackend(meeting, rank, timeout) for rank in range(world_size)]
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def run(backend: ThreadsBackend) -> None:
        _current.backend = backend
        try:
            results[backend.rank] = function(backend, *args)
        except BaseException as error:  # also SystemExit, and what a test's skip() raises: it is raised again below
            errors[backend.rank] = error
        meeting.leave(backend.rank, errors.get(backend.rank))

    # Daemons, for an interrupted notebook must not wait for a rank that is busy.
    threads = [threading.Thread(target=run, args=(b,), name=f"rank {b.rank}", daemon=True) for b in backends]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:
        for rank in range(world_size):
            meeting.leave(rank, error)
        raise
    if errors:
        raise _original(errors)
    return [results[rank] for rank in range(world_size)]


class ThreadsBackend(Backend):
    """One rank of `run_threads`, which makes it. Tensors of any device; on CUDA all ranks must use the default stream.

    A collective posts a copy of its input and does the rest in `wait`. `all_reduce` adds in rank order in the tensor's
    own dtype, so every rank gets the same bits. A rank that returns or raises fails the others' waits for it at once.
    """

    name = "threads"
    device_type = None

    def __init__(self, meeting: _Meeting, rank: int, timeout: float | None = None) -> None:
        super().__init__(rank, meeting.size, timeout)
        self._meeting = meeting
        self._posted = 0

    @staticmethod
    def current() -> ThreadsBackend | None:
        """The backend of the rank that the calling thread is; None outside `run_threads`."""
        return getattr(_current, "backend", None)

    def _all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        def receive(inputs: list[Tensor]) -> None:
            for piece, sent in zip(output.chunk(self.size), inputs, strict=True):
                piece.copy_(sent.chunk(self.size)[self.rank])

        return self._post("all_to_all", input, receive)

    def _all_gather(self, output: Tensor, input: Tensor) -> Handle:
        def receive(inputs: list[Tensor]) -> None:
            for piece, sent in zip(output.chunk(self.size), inputs, strict=True):
                piece.copy_(sent)

        return self._post("all_gather", input, receive)

    def _all_reduce(self, tensor: Tensor) -> Handle:
        def receive(inputs: list[Tensor]) -> None:
            tensor.copy_(inputs[0])
            for sent in inputs[1:]:
                tensor.add_(sent)

        return self._post("all_reduce", tensor, receive)

    def _barrier(self) -> None:
        self._post("barrier", torch.empty(0), lambda inputs: None).wait(self.timeout)

    def _part(self, members: Sequence[int]) -> ThreadsBackend:
        meeting = self._meeting.part(self._posted, tuple(members))
        return ThreadsBackend(meeting, members.index(self.rank), self.timeout)

    def _post(self, operation: str, tensor: Tensor, receive: Callable[[list[Tensor]], None]) -> Handle:
        number, self._posted = self._posted, self._posted + 1
        self._meeting.post(number, self.rank, operation, tensor.detach().clone())
        return _Posted(self._meeting, number, receive)


class _Posted:
    """A collective whose input is posted under a number that all ranks count alike."""

    def __init__(self, meeting: _Meeting, number: int, receive: Callable[[list[Tensor]], None]) -> None:
        self._meeting = meeting
        self._number = number
        self._receive = receive

    def wait(self, timeout: float) -> None:
        with torch.no_grad():
            self._receive(self._meeting.collect(self._number, timeout))
        self._meeting.done(self._number)


class _Slot:
    """What the ranks have posted under one number."""

    def __init__(self) -> None:
        self.inputs: dict[int, tuple[str, Tensor]] = {}
        self.readers = 0


class _Meeting:
    """Where the ranks of one `run_threads` leave tensors for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._slots: dict[int, _Slot] = {}
        self._gone: dict[int, BaseException | None] = {}
        self._parts: dict[tuple[int, tuple[int, ...]], _Meeting] = {}

    def part(self, number: int, members: tuple[int, ...]) -> _Meeting:
        """Where these ranks meet alone; `number` tells it from those that they have asked for before."""
        with self._changed:
            return self._parts.setdefault((number, members), _Meeting(len(members)))

    def post(self, number: int, rank: int, operation: str, tensor: Tensor) -> None:
        with self._changed:
            self._slots.setdefault(number, _Slot()).inputs[rank] = (operation, tensor)
            self._changed.notify_all()

    def collect(self, number: int, timeout: float) -> list[Tensor]:
        """Every rank's tensor, in rank order, once all have posted theirs; raises once one cannot any more."""
        with self._changed:
            inputs = self._slots[number].inputs
            over = self._changed.wait_for(
                lambda: len(inputs) == self.size or self._first_gone(inputs) is not None, timeout
            )
            gone = self._first_gone(inputs)
            if gone is not None:
                raise _PeerGone(gone, self._gone[gone])
            if not over:
                raise TimeoutError(f"nothing from ranks {[rank for rank in range(self.size) if rank not in inputs]}")
        posted = [inputs[rank] for rank in range(self.size)]
        calls = [f"{operation} of {tensor.numel()} {tensor.dtype}" for operation, tensor in posted]
        if len(set(calls)) > 1:
            raise RuntimeError(f"ranks called different collectives, in rank order {calls}")
        return [tensor for _, tensor in posted]

    def done(self, number: int) -> None:
        """One rank has read what is under this number; the last one clears it away."""
        with self._changed:
            self._slots[number].readers += 1
            if self._slots[number].readers == self.size:
                del self._slots[number]

    def leave(self, rank: int, error: BaseException | None) -> None:
        """This rank will post nothing more, nor in any part."""
        with self._changed:
            self._gone.setdefault(rank, error)
            self._changed.notify_all()
            parts = [(part, members.index(rank)) for (_, members), part in self._parts.items() if rank in members]
        for part, number in parts:
            part.leave(number, error)

    def _first_gone(self, inputs: dict[int, tuple[str, Tensor]]) -> int | None:
        """The rank to blame for what is missing, the first that went, for others follow; None if it may still come."""
        return next((rank for rank in self._gone if rank not in inputs), None)


class _PeerGone(Exception):
    """Another rank has ended without joining a collective."""

    def __init__(self, rank: int, error: BaseException | None) -> None:
        how = "has returned" if error is None else f"has failed with {type(error).__name__}: {error}"
        super().__init__(f"rank {rank} {how}")


_current = threading.local()


def _original(errors: dict[int, BaseException]) -> BaseException:
    """The error to raise for all: of the lowest rank that failed by itself."""
    by_rank = sorted(errors.items(), key=lambda item: (_is_consequence(item[1]), item[0]))
    (first_rank, first), others = by_rank[0], by_rank[1:]
    if hasattr(first, "add_note"):  # Python 3.11
        first.add_note(f"raised by rank {first_rank}")
        for rank, error in others:
            first.add_note(f"rank {rank} failed too, with {type(error).__name__}: {error}")
    return first


def _is_consequence(error: BaseException | None) -> bool:
    """Whether another rank's end led to this error."""
    seen = 0
    while error is not None and seen < 100:
        if isinstance(error, _PeerGone):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
