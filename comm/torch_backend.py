"""Transports over a torch.distributed process group: Gloo for CPU tensors, NCCL for CUDA tensors."""

from __future__ import annotations

import atexit
import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, AllToAllOptions, BarrierOptions
from torch.distributed import distributed_c10d

from onebit.comm.backend import DEFAULT_TIMEOUT, Backend, Collective, Handle
from onebit.comm.errors import BackendError
from onebit.comm.peer_memory import PeerCollective, PeerMemory
from onebit.comm.striping import Stripes
from onebit.comm.watch import Watch

HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # what PyTorch does about NCCL's errors; 0: nothing
NAMES = {"cpu": "gloo", "cuda": "nccl"}

# Up to this many gathered bytes Gloo does better with one exchange than with its ring of n - 1 steps. Pairs of isend
# and irecv are up to twice as fast as either on idle cores, but where ranks share cores they stall for time slices of
# the scheduler, milliseconds: Gloo's thread spins while a posting thread that holds its lock waits for a core.
SMALL_GATHER = 1 << 20

# Gloo's operation ends by itself at the time limit. Only if it has not after so many more seconds does `wait` give up
# on it: in older PyTorch, 2.7 for one, all_to_all knew the group's time limit alone.
GRACE = 1.0


class TorchBackend(Backend):
    """Collectives of one process group: ``gloo`` for CPU tensors, ``nccl`` for CUDA tensors, sub-groups included.

    Gloo: a peer that dies fails every rank's next `wait` at once, one that hangs fails it at the time limit. Gloo then
    closes the group's connections, so later collectives of this group fail immediately.

    NCCL: `wait` makes the current stream wait and never the host, so a step can be captured in a CUDA graph. The time
    limit is therefore the process group's own, for everything that uses the group: PyTorch's watchdog thread watches
    over it, logs the collective and ends the process. With ``TORCH_NCCL_ASYNC_ERROR_HANDLING=0`` in the environment
    when the group is made, that is left to `Watch`: steps that the device has been told to make, and hosts that wait in
    one, then end at the time limit, and the next use of the backend raises TransportError.

    all_to_all and all_gather go through `peers`, memory that all GPUs of a machine can write to, where they can: small
    ones that are started in line, and those whose output is a `buffer`. ``ONEBIT_PEER_MEMORY=0`` in the environment
    leaves all to NCCL. One that waits for a peer beyond the time limit ends by itself: what it brings then is NaN to
    every codec, so that no step is made of it, and the next use of the backend raises TransportError.

    Where NCCL goes over TCP sockets, large ones that are made often travel in `stripes`, over communicators of their
    own. ``ONEBIT_NCCL_STRIPES`` in the environment of all ranks says how many, 1 for none.

    Args:
        group: the process group; None: the default group.
        device_type: ``"cpu"`` for its Gloo half, ``"cuda"`` for its NCCL half.
        timeout: seconds that a collective may take. Gloo: of this backend alone; None: `DEFAULT_TIMEOUT`. NCCL: becomes
            the group's; None: the group keeps what `init_process_group` or `new_group` gave it.

    Attributes:
        peers: over NCCL whether peers' memory is used, and why not; else None.
        stripes: over NCCL how many of them large collectives travel in; else None.

    Raises:
        BackendError: torch.distributed is not initialised, or this rank is no member of the group; or
            ``ONEBIT_NCCL_STRIPES`` is no number of stripes.
    """

    in_processes = True

    def __init__(
        self, group: dist.ProcessGroup | None = None, device_type: str = "cpu", timeout: float | None = None
    ) -> None:
        group = as_member(dist.group.WORLD if group is None else group)
        self.name = NAMES[device_type]
        self.device_type = device_type
        super().__init__(group.rank(), group.size(), timeout)
        self.group = group
        self._made: dict[tuple[type, bool], Any] = {}
        self._watch: Watch | None = None
        self._parts: weakref.WeakSet[TorchBackend] = weakref.WeakSet()
        self.peers: PeerMemory | None = None
        self.stripes: Stripes | None = None
        if device_type == "cpu":
            _over_gloo.add(self)
        if device_type == "cuda":
            self.peers, self.stripes = PeerMemory(self), Stripes(self)
            if timeout is None:
                self.timeout = self._group_limit()
            else:
                self._transport._set_default_timeout(self._limit)
            if os.environ.get(HANDLING) == "0":
                watched = weakref.ref(self)  # else this backend and its watch would keep each other
                self._watch = Watch(lambda: _timeout_of(watched), lambda *what: _give_up(watched, *what))

    def trusted(self, made: Tensor) -> Tensor:
        return made if self._watch is None else self._watch.trusted(made)

    def limited(self, operation: str) -> AbstractContextManager[None]:
        return nullcontext() if self._watch is None else self._watch.limited(operation)

    def give_up(self, operation: str, waited: float) -> None:
        """End all collectives of the group and of its parts; the next use raises TransportError."""
        self._order.given_up = (operation, waited)
        self._order.broken_by = operation
        self._abort()

    @property
    def sound(self) -> bool:
        self._ask_peers()
        return super().sound

    def check(self) -> None:
        self._ask_peers()
        super().check()

    def _ask_peers(self) -> None:
        """Take note if a kernel has stopped waiting for a peer: what it brought is worthless, and the group broken."""
        if self.peers is not None and self.peers.given_up and self._order.given_up is None:
            self._order.given_up = ("exchange through peers' memory", self.timeout)
            self._order.broken_by = self._order.given_up[0]

    def _abort(self) -> None:
        """Have the device go on, at once in all groups: to be rid of one NCCL waits for the kernels of all."""
        backends = list(self._family())
        for backend in backends:
            if backend.peers is not None:
                backend.peers.give_up()
        aborts = [threading.Thread(target=backend._transport.abort, daemon=True) for backend in backends]
        for abort in aborts:
            abort.start()
        for abort in aborts:
            abort.join()

    def _family(self) -> Iterator[TorchBackend]:
        """This one, and those made of its ranks."""
        yield self
        for part in list(self._parts):
            yield from part._family()

    def _part(self, members: Sequence[int]) -> TorchBackend:
        """A process group of its own, which torch.distributed forgets with the default group."""
        if not self.divisible:
            raise BackendError(
                f"rank {self.rank}: this group has {self.size} of {dist.get_world_size()} ranks, and as "
                "init_process_group was given a device_id, NCCL makes smaller groups with all ranks alone: split the "
                "default group, or leave device_id out"
            )
        ranks = dist.get_process_group_ranks(self.group)
        group = dist.new_group(
            [ranks[member] for member in members],
            timeout=self._limit,
            backend=self.name,
            use_local_synchronization=True,
        )
        part = TorchBackend(group, str(self.device_type), None if self.name == "nccl" else self.timeout)
        self._parts.add(part)
        return part

    @property
    def divisible(self) -> bool:
        """Whether groups can be made of its ranks by them alone."""
        world = dist.group.WORLD
        alone = self.name == "nccl" and world is not None and world.bound_device_id and world.size() != self.size
        return not alone

    def group_count(self) -> int:
        """PyTorch names a group that its ranks make alone by how many groups they are in."""
        return len(distributed_c10d._world.pg_names)

    def _buffer(self, bytes: int, device: torch.device) -> Tensor:
        made = None if self.peers is None else self.peers.buffer(bytes)
        return super()._buffer(bytes, device) if made is None else made

    def _collective(self, operation: str, output: Tensor, input: Tensor, wire_bytes: int) -> Collective:
        if self.peers is None or self.stripes is None:
            return super()._collective(operation, output, input, wire_bytes)
        return PeerCollective(self, self.peers, self.stripes, operation, output, input, wire_bytes)

    def _all_to_all(self, output: Tensor, input: Tensor) -> Handle | None:
        return self._exchange(_as_bytes(output), _as_bytes(input))

    def _all_gather(self, output: Tensor, input: Tensor) -> Handle | None:
        return self._gather(_as_bytes(output), _as_bytes(input))

    def _all_to_all_in_line(self, output: Tensor, input: Tensor) -> Handle | None:
        return self._exchange(_as_bytes(output), _as_bytes(input), in_line=True)

    def _all_gather_in_line(self, output: Tensor, input: Tensor) -> Handle | None:
        return self._gather(_as_bytes(output), _as_bytes(input), in_line=True)

    def _all_reduce(self, tensor: Tensor) -> Handle | None:
        return self._handle(self._transport.allreduce([tensor], self._options(AllreduceOptions)))  # sums

    def _barrier(self) -> None:
        options = self._options(BarrierOptions)
        if self.device_type == "cuda":
            options.device_ids = [torch.cuda.current_device()]
        handle = self._handle(self._transport.barrier(options))
        if handle is not None:
            handle.wait(self.timeout)

    def send(self, outputs: list[Tensor], inputs: list[Tensor]) -> Handle | None:
        """Tensor i of `inputs` to rank i, and one from it; over NCCL, beside the current stream."""
        return self._handle(self._transport.alltoall(outputs, inputs, self._options(AllToAllOptions)))

    def _exchange(self, output: Tensor, input: Tensor, in_line: bool = False) -> Handle | None:
        options = self._options(AllToAllOptions, in_line)
        return self._handle(self._transport.alltoall_base(output, input, [], [], options))

    def _gather(self, output: Tensor, input: Tensor, in_line: bool = False) -> Handle | None:
        if self.name == "gloo" and output.numel() <= SMALL_GATHER:
            return self._exchange(output, input.repeat(self.size))
        options = self._options(AllgatherOptions, in_line)
        return self._handle(self._transport._allgather_base(output, input, options))

    @cached_property
    def _transport(self) -> Any:
        """The group's half, called without the group's dispatch between devices: that takes microseconds."""
        return self.group._get_backend(torch.device(str(self.device_type)))

    def _options(self, kind: type, in_line: bool = False) -> Any:
        """Options of a collective, made once; `in_line`: NCCL is to use the current stream and not one of its own."""
        options = self._made.get((kind, in_line))
        if options is None:
            options = self._made[kind, in_line] = kind()
            if hasattr(options, "asyncOp"):  # since PyTorch 2.8 for all kinds; without it NCCL has its own stream
                options.asyncOp = not in_line
        if self.device_type == "cpu":
            options.timeout = self._limit
        return options

    def _handle(self, work: _TorchWork | None) -> Handle | None:
        if work is None:  # what NCCL returns in line
            return None
        return _HostWork(work) if self.device_type == "cpu" else _StreamWork(work)

    @property
    def _limit(self) -> timedelta:
        return timedelta(seconds=self.timeout)

    def _group_limit(self) -> float:
        try:
            limit: timedelta = self._transport.options._timeout
        except (AttributeError, RuntimeError):  # with TORCH_DISTRIBUTED_DEBUG=DETAIL, for one, it does not tell
            return DEFAULT_TIMEOUT
        return limit.total_seconds()


_over_gloo: weakref.WeakSet[TorchBackend] = weakref.WeakSet()


@atexit.register
def _let_go() -> None:
    """Drop groups that the caller has destroyed: a thread of Gloo's that outlives the interpreter can abort it."""
    if not dist.is_initialized():
        for backend in list(_over_gloo):
            vars(backend).pop("_transport", None)
            vars(backend).pop("group", None)


def _timeout_of(reference: weakref.ref[TorchBackend]) -> float:
    backend = reference()
    return math.inf if backend is None else backend.timeout


def _give_up(reference: weakref.ref[TorchBackend], operation: str, waited: float) -> None:
    backend = reference()
    if backend is not None:
        backend.give_up(operation, waited)


def as_member(group: object) -> dist.ProcessGroup:
    """The process group itself, if this rank can use it.

    Raises:
        BackendError: torch.distributed is not initialised, or this rank is no member of the group.
    """
    if isinstance(group, dist.ProcessGroup):
        return group
    if not dist.is_initialized():
        raise BackendError("torch.distributed is not initialised; call torch.distributed.init_process_group first")
    raise BackendError(f"rank {dist.get_rank()} is no member of this process group; only those given to new_group are")


class _TorchWork(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...


class _HostWork:
    def __init__(self, work: _TorchWork) -> None:
        self._work = work

    def wait(self, timeout: float) -> None:
        self._work.wait(timedelta(seconds=timeout + GRACE))


class _StreamWork:
    def __init__(self, work: _TorchWork) -> None:
        self._work = work

    def wait(self, timeout: float) -> None:
        self._work.wait()  # given a time limit, PyTorch may block the host


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as (k,) uint8: Gloo knows few dtypes, and a byte is a byte."""
    if tensor.dtype == torch.uint8:
        return tensor
    return tensor.detach().view(torch.uint8)
