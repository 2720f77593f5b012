"""The contract of a transport: four collectives over flat tensors, counted where bytes are handed over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from onebit.comm.errors import BackendError, TransportError
from onebit.comm.order import Guard, Order

DEFAULT_TIMEOUT = 300.0  # seconds; long enough for a slow first step, short enough to find a dead rank the same day

# What every transport can sum; the other collectives move bytes and take any dtype.
SUMMABLE = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.uint8, torch.int32, torch.int64),
)


class Handle(Protocol):
    """A collective in flight, as a transport sees it."""

    def wait(self, timeout: float) -> None:
        """Block until the collective is complete; raise any exception if it is not after `timeout` seconds."""


@dataclass
class Traffic:
    """What one rank has handed to its transport since the last `reset()`; a piece kept by the rank itself is not sent.

    Attributes:
        collectives: number of collectives started, barriers left out.
        wire_bytes: bytes that this rank sends: for all_to_all and all_gather the n - 1 pieces that leave it, for
            all_reduce 2(n - 1)/n of the tensor, which is what a bandwidth-optimal algorithm sends.
    """

    collectives: int = 0
    wire_bytes: int = 0

    def add(self, wire_bytes: int) -> None:
        """Count one collective."""
        self.collectives += 1
        self.wire_bytes += wire_bytes

    def reset(self) -> None:
        """Start from zero again."""
        self.collectives = 0
        self.wire_bytes = 0


class Work:
    """A started collective. The tensors given to it must stay untouched until `wait` returns."""

    def __init__(self, backend: Backend, operation: str, handle: Handle | None) -> None:
        self._backend = backend
        self._operation = operation
        self._handle = handle

    def wait(self) -> None:
        """Return when the output may be read (on CUDA: by work queued on the current stream from now on).

        Raises:
            TransportError: a peer is dead or slower than the backend's timeout, or the transport failed.
        """
        if self._handle is None:
            return
        with self._backend.guard(self._operation):
            self._handle.wait(self._backend.timeout)
        self._handle = None  # not before: a wait that failed fails again


class Collective:
    """An all_to_all or all_gather over fixed buffers: checked once, to be started any number of times, one by one.

    Made by `Backend.prepare_all_to_all` and `Backend.prepare_all_gather`.
    """

    def __init__(self, backend: Backend, operation: str, output: Tensor, input: Tensor, wire_bytes: int) -> None:
        self._backend = backend
        self._operation = operation
        self._output = output
        self._input = input
        self._wire_bytes = wire_bytes
        self._moves = input.numel() > 0  # sizes agree on all ranks, so all of them leave an empty collective out
        self._guard = backend.guard(operation)
        self._beside, self._in_line = f"_{operation}", f"_{operation}_in_line"
        self._started = False  # ever

    def start(self, *, in_line: bool = False) -> Work:
        """Start it; the buffers must stay untouched until `Work.wait` returns.

        Args:
            in_line: nothing else is to run until `wait`, which is called all the same. On CUDA the collective may then
                be part of the current stream, which starts sooner than a stream beside it.

        Raises:
            TransportError: the transport refused to start.
        """
        handle = None
        if self._moves:
            with self._guard:
                handle = self._launch(in_line)
        self._started = True
        self._backend.traffic.add(self._wire_bytes)
        return Work(self._backend, self._operation, handle)

    def _launch(self, in_line: bool) -> Handle | None:
        start = getattr(self._backend, self._in_line if in_line else self._beside)
        handle: Handle | None = start(self._output, self._input)
        return handle


class Backend(ABC):
    """One rank's end of a group of ranks that exchange flat tensors.

    A new transport is one file: subclass, implement the four abstract methods, and `_part` where groups can be split,
    and add a line to `onebit.comm.registry`. This class checks arguments, counts traffic and turns failures into
    `TransportError`. After one every further collective raises at once, for ranks could not tell any more which belong
    together.

    A subclass sets `name` and `device_type` in the class, or in its objects before it calls ``super().__init__``.

    Attributes:
        name: ``"gloo"``, ``"nccl"``, ``"mpi"``, ``"threads"`` or ``"single"``.
        rank, size: this rank's number in the group and the number of ranks.
        device_type: the one type of device whose tensors it carries, ``"cpu"`` or ``"cuda"``; None: several.
        in_processes: its ranks are processes, of which those of one machine may share memory.
        timeout: seconds that a collective may take before `TransportError`.
        traffic: what this rank has sent.

    Raises:
        BackendError: the timeout is not a positive number, or the subclass lacks a name or a device_type.
    """

    name: str
    device_type: str | None
    in_processes: bool = False

    def __init__(self, rank: int, size: int, timeout: float | None = None) -> None:
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
            raise BackendError(f"timeout must be a positive number of seconds, got {timeout!r}")
        lacking = [key for key in ("name", "device_type") if not hasattr(type(self), key) and key not in vars(self)]
        if lacking:
            raise BackendError(
                f"{type(self).__name__} has no {' and no '.join(lacking)}, and a Backend needs a name, such as 'tcp', "
                "and a device_type, 'cpu', 'cuda' or None for several; set them in the class, or in the object before "
                "super().__init__()"
            )
        self.rank = rank
        self.size = size
        self.timeout = DEFAULT_TIMEOUT if timeout is None else float(timeout)
        self.traffic = Traffic()
        self._order = Order()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size}, timeout={self.timeout})"

    def all_to_all(self, output: Tensor, input: Tensor) -> Work:
        """Start sending piece i of `input` to rank i; piece i of `output` comes from rank i.

        Args:
            output: (n·k,) any dtype, contiguous; written. Must not overlap `input`.
            input: (n·k,) of the same dtype and device, contiguous.

        Raises:
            BackendError: wrong device, layout or size.
            TransportError: the transport refused to start.
        """
        return self.prepare_all_to_all(output, input).start()

    def prepare_all_to_all(self, output: Tensor, input: Tensor) -> Collective:
        """As `all_to_all`, to be started later, and again and again; only the start is collective."""
        self._check("all_to_all", output, input)
        if output.numel() != input.numel() or input.numel() % self.size:
            raise BackendError(
                f"rank {self.rank}: all_to_all takes two tensors of one size, a multiple of {self.size} ranks; "
                f"got {input.numel()} and {output.numel()} elements"
            )
        sent = _nbytes(input) // self.size * (self.size - 1)
        return self._collective("all_to_all", output, input, sent)

    def all_gather(self, output: Tensor, input: Tensor) -> Work:
        """Start gathering every rank's `input`, in rank order, into `output` on every rank.

        Args:
            output: (n·k,) any dtype, contiguous; written. Must not overlap `input`.
            input: (k,) of the same dtype and device, contiguous.

        Raises:
            BackendError: wrong device, layout or size.
            TransportError: the transport refused to start.
        """
        return self.prepare_all_gather(output, input).start()

    def prepare_all_gather(self, output: Tensor, input: Tensor) -> Collective:
        """As `all_gather`, to be started later, and again and again; only the start is collective."""
        self._check("all_gather", output, input)
        if output.numel() != input.numel() * self.size:
            raise BackendError(
                f"rank {self.rank}: all_gather of {input.numel()} elements over {self.size} ranks needs an output of "
                f"{input.numel() * self.size}, got {output.numel()}"
            )
        return self._collective("all_gather", output, input, _nbytes(input) * (self.size - 1))

    def buffer(self, bytes: int, device: torch.device) -> Tensor:
        """Return memory for the output of a collective that is prepared once and made often; collective.

        Args:
            bytes: of the output; the same on every rank.

        Returns:
            (bytes,) uint8 of zeros on `device`: any memory, unless a transport has some that it fills sooner.

        Raises:
            BackendError: it carries no tensors on such a device, or the size is no number of bytes.
            TransportError: a rank did not take part within the timeout.
        """
        if not isinstance(bytes, int) or isinstance(bytes, bool) or bytes < 0:
            raise BackendError(f"rank {self.rank}: buffer takes a number of bytes, 0 or more, got {bytes!r}")
        if not self.carries(device):
            raise BackendError(
                f"rank {self.rank}: buffer on the {self.name!r} backend is for {self.carried} tensors, got {device}; "
                "give the device of the tensors, or name a backend for that device"
            )
        return self._buffer(bytes, device)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Start summing `tensor` over all ranks in place; every rank gets the same bits.

        Args:
            tensor: (k,) of a dtype in `SUMMABLE`, contiguous; overwritten by the sum. Integer sums must fit the dtype,
                for transports differ in whether they wrap or saturate.

        Raises:
            BackendError: wrong device, layout or dtype.
            TransportError: the transport refused to start.
        """
        self._check("all_reduce", tensor)
        if tensor.dtype not in SUMMABLE:
            names = ", ".join(_dtype(dtype) for dtype in SUMMABLE)
            raise BackendError(f"rank {self.rank}: all_reduce sums {names}; got {_shape(tensor)}")
        sent = 2 * (self.size - 1) * _nbytes(tensor) // self.size
        handle = None
        if tensor.numel():
            with self.guard("all_reduce"):
                handle = self._all_reduce(tensor)
        self.traffic.add(sent)
        return Work(self, "all_reduce", handle)

    def split(self, color: int) -> Backend:
        """The ranks that call this with the same color as a group of their own, in this group's order; collective.

        Every call makes new groups, with a traffic count of their own. A part that gives up on a collective breaks this
        group and its other parts on this rank, and the other way round, for what comes after it might not be matched.
        A part is of no more use once this group has been closed.

        Args:
            color: any number that fits 64 bits.

        Raises:
            BackendError: a rank's color is no such number, or ranks of one color have made other groups, on all ranks;
                or this transport cannot be split.
            TransportError: a rank did not take part within the timeout.
        """
        members = self._members(color)
        with self.guard("split"), self.limited("split"):
            part = self._part(members)
        part.join_order(self)
        return part

    def join_order(self, other: Backend) -> None:
        """From now on a collective that fails in one of both groups breaks both on this rank."""
        self._order = other._order

    def carries(self, device: torch.device) -> bool:
        """Whether it carries tensors on `device`."""
        return self.device_type in (None, device.type)

    @property
    def carried(self) -> str:
        """The types of devices whose tensors it carries, for messages."""
        return self.device_type or "all"

    def barrier(self) -> None:
        """Return when every rank has called it; TransportError after the timeout."""
        with self.guard("barrier"), self.limited("barrier"):
            self._barrier()
        self.check()

    @property
    def sound(self) -> bool:
        """Whether every collective of this rank has completed so far."""
        return self._order.broken_by is None

    def check(self) -> None:
        """Raise the TransportError of collectives that were given up behind the host's back, as NCCL's can be."""
        if self._order.given_up is not None:
            detail = "a peer did not take part, and what was on its way was aborted; "
            raise TransportError(self.rank, *self._order.given_up, detail + "start again with a new group of ranks")

    def trusted(self, made: Tensor) -> Tensor:
        """Return `made`, 0-dim bool, but false where collectives queued before it turn out to have been given up."""
        return made

    def limited(self, operation: str) -> AbstractContextManager[None]:
        """A `with` block in which the host may wait for the device, which the timeout limits if nothing else does."""
        return nullcontext()

    def guard(self, operation: str) -> Guard:
        """A context that turns any failure inside it into a `TransportError` about `operation`; see `Guard`."""
        return Guard(self.rank, self._order, operation)

    def _collective(self, operation: str, output: Tensor, input: Tensor, wire_bytes: int) -> Collective:
        """What the `prepare_` methods return, once the tensors are found right."""
        return Collective(self, operation, output, input, wire_bytes)

    @abstractmethod
    def _all_to_all(self, output: Tensor, input: Tensor) -> Handle | None:
        """Start it, for at least one element; None when it is complete on return."""

    @abstractmethod
    def _all_gather(self, output: Tensor, input: Tensor) -> Handle | None:
        """Start it, for at least one element; None when it is complete on return."""

    def _buffer(self, bytes: int, device: torch.device) -> Tensor:
        """As `buffer`; a transport that has memory of its own overrides it."""
        return torch.zeros(bytes, dtype=torch.uint8, device=device)

    def _part(self, members: Sequence[int]) -> Backend:
        """These ranks, which call this together, as a group of their own, in this order; this rank is one of them."""
        raise BackendError(f"rank {self.rank}: the {self.name!r} backend cannot be split; it has no _part of its own")

    def _all_to_all_in_line(self, output: Tensor, input: Tensor) -> Handle | None:
        """As `_all_to_all`, for who waits at once; a transport that can make use of that overrides it."""
        return self._all_to_all(output, input)

    def _all_gather_in_line(self, output: Tensor, input: Tensor) -> Handle | None:
        """As `_all_gather`, for who waits at once; a transport that can make use of that overrides it."""
        return self._all_gather(output, input)

    @abstractmethod
    def _all_reduce(self, tensor: Tensor) -> Handle | None:
        """Start it, for at least one element; None when it is complete on return."""

    @abstractmethod
    def _barrier(self) -> None:
        """Block until every rank is here, at most `self.timeout` seconds."""

    def group_count(self) -> int:
        """In how many groups this process is, where only ranks that are in as many can make a new one; else 0."""
        return 0

    def _members(self, color: int) -> list[int]:
        """The ranks of this color; BackendError, on all ranks, where one has none, or some cannot be a group."""
        fits = isinstance(color, int) and not isinstance(color, bool) and -(2**63) <= color < 2**63
        given = [fits, color if fits else 0, self.group_count()]
        mine = torch.tensor(given, dtype=torch.int64, device=self.device_type or "cpu")
        everyone = mine.new_empty(3 * self.size)
        with self.limited("split"):
            self.all_gather(everyone, mine).wait()
            rows: list[list[int]] = everyone.view(self.size, 3).tolist()
        self.check()
        refused = [rank for rank, (fit, _, _) in enumerate(rows) if not fit]
        if refused:
            own = "" if fits else f"; got {color!r}"
            raise BackendError(
                f"rank {self.rank}: split: the color must be an int of 64 bits, and on rank{'s' * (len(refused) > 1)} "
                f"{', '.join(map(str, refused))} it is not{own}"
            )
        parts = {other: [rank for rank, row in enumerate(rows) if row[1] == other] for _, other, _ in rows}
        for ranks in parts.values():
            counts = [rows[rank][2] for rank in ranks]
            if len(set(counts)) > 1:
                raise BackendError(
                    f"rank {self.rank}: split: ranks can make a group without the rest only where they are in equally "
                    f"many groups, and ranks {ranks} are in {counts}; split, or make what does so, before groups that "
                    "some of them are in, or have them all be in equally many"
                )
        return parts[color]

    def _check(self, operation: str, *tensors: Tensor) -> None:
        first = tensors[0]
        for tensor in tensors:
            if not self.carries(tensor.device):
                raise BackendError(
                    f"rank {self.rank}: {operation} on the {self.name!r} backend carries {self.carried} tensors, "
                    f"got one on {tensor.device}; move it, or name a backend for that device ('gloo', 'mpi' or "
                    "'threads' for cpu, 'nccl' or 'mpi' for cuda)"
                )
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise BackendError(f"rank {self.rank}: {operation} takes contiguous 1-D tensors, got {_shape(tensor)}")
            if tensor.dtype != first.dtype or tensor.device != first.device:
                raise BackendError(
                    f"rank {self.rank}: {operation} takes tensors of one dtype and device, got {_shape(first)} and "
                    f"{_shape(tensor)}"
                )


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shape(tensor: Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
    return f"{tuple(tensor.shape)} {_dtype(tensor.dtype)} on {tensor.device}, {layout}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
