"""Collectives of the GPUs of one machine by one kernel each, through memory that all of them can write to.

NCCL takes longer to be told of a small collective than to make it, and it moves large payloads through buffers of its
own. Where all ranks of a group are on one machine and their GPUs reach each other's memory, `comm.gpu.exchange` moves
small pieces instead, and `comm.gpu.push` large ones, straight to where they are wanted. The memory, and how others come
by it, is PyTorch's symmetric memory.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from onebit.comm.backend import Handle
from onebit.comm.machine import machine
from onebit.comm.numbers import gather_numbers
from onebit.comm.striping import StripedCollective, Stripes
from onebit.compress.kernels import kernels_for
from onebit.compress.layout import ALIGNMENT

if TYPE_CHECKING:
    from onebit.comm.gpu.exchange import Exchange
    from onebit.comm.gpu.push import Push
    from onebit.comm.torch_backend import TorchBackend

_log = logging.getLogger(__name__)
Made = TypeVar("Made")

SWITCH = "ONEBIT_PEER_MEMORY"  # "0" in the environment of any rank: NCCL for all
LARGEST = 5 << 18  # bytes of a small collective's output, such as the signs of 10 Mi numbers

_retired: list[Any] = []  # memory that nobody needs, but that a kernel may still be using


class PeerMemory:
    """Whether the ranks of an NCCL backend reach each other's memory, and whether one has waited in vain.

    Attributes:
        refusal: why they do not; None: they do, or nobody has asked so far.
    """

    def __init__(self, backend: TorchBackend) -> None:
        self._backend = weakref.ref(backend)
        self._given_up = torch.zeros(1, dtype=torch.int32, pin_memory=torch.cuda.is_available())
        self._seen = self._given_up.numpy()  # the same memory, looked at before every collective
        self._pushes: dict[int, Push] = {}
        self.refusal: str | None = None

    @property
    def given_up(self) -> bool:
        """Whether a kernel has stopped waiting for a peer, or was told to."""
        return bool(self._seen[0])

    def give_up(self) -> None:
        """Have all kernels stop waiting; what they write is not to be trusted."""
        self._seen[0] = 1

    def exchange(self, bytes: int, pieces: int) -> Exchange | None:
        """Memory for exchanges of pieces of one size; collective, and the host waits for the other ranks.

        Args:
            bytes: of a piece.
            pieces: that a rank sends: one for each, or the same for all.

        Returns:
            None, on all ranks alike, where NCCL is to be used; `refusal` says why if it is for any size.
        """
        backend = self._backend()
        if backend is None or bytes * backend.size > LARGEST:
            return None
        from onebit.comm.gpu.exchange import mailbox_bytes

        make = partial(_make_exchange, backend, bytes, pieces, self._given_up)
        return self._mapped(backend, mailbox_bytes(bytes, backend.size), make)

    def buffer(self, bytes: int) -> Tensor | None:
        """Memory for large outputs of collectives, zeros; collective, and the host waits for the other ranks.

        Args:
            bytes: of the output, from all ranks together.

        Returns:
            (bytes,) uint8, of which `push_to` knows as long as it is kept; None, on all ranks alike, where any other
            memory will do.
        """
        backend = self._backend()
        if backend is None or bytes <= LARGEST or bytes % (ALIGNMENT * backend.size):
            return None
        from onebit.comm.gpu.push import memory_bytes

        make = partial(_make_buffer, backend, bytes, self._given_up, self._pushes)
        return self._mapped(backend, memory_bytes(bytes), make)

    def push_to(self, output: Tensor) -> Push | None:
        """What fills `output` on all ranks, if it is a whole `buffer`."""
        push = self._pushes.get(output.data_ptr())
        return push if push is not None and push.bytes == output.nbytes else None

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """For collectives beside others' work; its kernels go first, for they are few and others wait for them."""
        return torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]

    def _mapped(self, backend: TorchBackend, size: int, make: Callable[[Tensor, Any], Made]) -> Made | None:
        """What `make` makes of memory that all ranks have mapped, if all can; or the reason in `refusal`.

        Args:
            size: of the memory, in bytes.
            make: is given (size,) uint8, zeros on every rank, and PyTorch's word on where every rank's are.
        """
        memory, made = None, None
        if self.refusal is None:
            problem = _refusal(backend)
            if problem is None:
                memory, problem = self._tried(backend, partial(_allocate, size))
            self._agree(backend, problem)  # before any rank waits for others to map what they do not have
        if self.refusal is None and memory is not None:
            given = memory
            made, problem = self._tried(backend, lambda: make(given, _rendezvous(given, backend)))
            self._agree(backend, problem)
        return made if self.refusal is None else None

    def _tried(self, backend: TorchBackend, run: Callable[[], Made]) -> tuple[Made | None, str | None]:
        """What `run` returns, or what is wrong."""
        with backend.limited("peer memory"):
            try:
                return run(), None
            except Exception as error:  # whatever PyTorch raises where the driver does not do it
                return None, f"symmetric memory: {error}"

    def _agree(self, backend: TorchBackend, problem: str | None) -> None:
        """Have the first problem of any rank become the refusal of all; ends in an error if one of them is dead."""
        rows = gather_numbers(backend, [float(problem is not None), float(machine())])
        troubled = [rank for rank, (trouble, _) in enumerate(rows) if trouble]
        if problem is not None:
            self.refusal = problem
        elif troubled:
            self.refusal = f"rank {troubled[0]} refused"
        elif len({where for _, where in rows}) > 1:
            self.refusal = "the ranks are on several machines"
        if self.refusal is not None:
            _log.debug("rank %d: all collectives go through NCCL: %s", backend.rank, self.refusal)


class PeerCollective(StripedCollective):
    """A collective over NCCL, but through peers' memory where its output is a `PeerMemory.buffer`, or small.

    A small one takes that way if nothing else is to run until `wait`. Its first start is NCCL's: milliseconds to map
    memory are not worth it for what is made once.
    """

    def __init__(
        self,
        backend: TorchBackend,
        peers: PeerMemory,
        stripes: Stripes,
        operation: str,
        output: Tensor,
        input: Tensor,
        wire_bytes: int,
    ) -> None:
        super().__init__(backend, stripes, operation, output, input, wire_bytes)
        self._peers = peers
        self._push = peers.push_to(output)
        self._exchange: Exchange | None = None
        self._asked = False
        self._pushing: _Beside | None = None

    def _launch(self, in_line: bool) -> Handle | None:
        if self._push is not None:
            self._backend.check()
            return self._pushed(self._push, in_line)
        if not in_line or not self._started:
            return super()._launch(in_line)
        if not self._asked and not torch.cuda.is_current_stream_capturing():  # while others cannot be waited for
            self._asked = True
            each = self._output.nbytes // self._backend.size
            self._exchange = self._peers.exchange(each, self._input.nbytes // each)
        if self._exchange is None:
            return super()._launch(in_line)
        self._backend.check()
        self._exchange(self._output, self._input, self._backend.timeout)
        return None

    def _pushed(self, push: Push, in_line: bool) -> Handle | None:
        run = partial(push, self._input, self._backend.timeout)
        if in_line:
            run()
            return None
        if self._pushing is None:
            self._pushing = _Beside(self._peers.stream)
        self._pushing.start(run)
        return self._pushing


class _Beside:
    """What a stream does beside the current one, again and again: after what that was told, before a `wait`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        # Made once, and used for every start: to make one takes as long as to start a kernel.
        self._told, self._done = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start(self, run: Callable[[torch.cuda.Stream], None]) -> None:
        self._told.record()
        self._told.wait(self._stream)
        run(self._stream)
        self._done.record(self._stream)

    def wait(self, timeout: float) -> None:
        self._done.wait()  # the current stream does, not the host


def _refusal(backend: TorchBackend) -> str | None:
    """Why this rank cannot or should not."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return "NCCL_P2P_DISABLE is set"
    if kernels_for(torch.device("cuda")).name != "gpu":
        return "no CUDA kernels"
    try:
        from torch.distributed import _symmetric_memory  # noqa: F401
    except ImportError as error:
        return str(error)
    from onebit.comm.gpu.exchange import MOST_RANKS

    return f"more than {MOST_RANKS} ranks" if backend.size > MOST_RANKS else None


def _allocate(size: int) -> Tensor:
    """(size,) uint8 that others can map, zeros; what nobody needs any more is freed first."""
    from torch.distributed import _symmetric_memory

    torch.cuda.synchronize()
    _retired.clear()
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        memory = _symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError:  # in the middle of a training PyTorch's allocator may keep what is free for itself
        torch.cuda.empty_cache()
        memory = _symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize()
    return memory


def _rendezvous(memory: Tensor, backend: TorchBackend) -> Any:
    """Where the memory of every rank is; collective."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.rendezvous(memory, backend.group)


def _make_exchange(
    backend: TorchBackend, bytes: int, pieces: int, given_up: Tensor, memory: Tensor, shared: Any
) -> Exchange:
    from onebit.comm.gpu.exchange import Exchange

    where = shared.buffer_ptrs_dev
    exchange = Exchange(where, backend.rank, backend.size, bytes, pieces, given_up, memory.device)
    weakref.finalize(exchange, _retired.append, (memory, shared, exchange._state, given_up)).atexit = False
    return exchange


def _make_buffer(
    backend: TorchBackend, bytes: int, given_up: Tensor, pushes: dict[int, Push], memory: Tensor, shared: Any
) -> Tensor:
    """The memory; what fills it is in `pushes` by its address, as long as somebody keeps it."""
    from onebit.comm.gpu.push import Push

    push = Push(shared.buffer_ptrs_dev, backend.rank, backend.size, bytes, given_up, memory.device)
    buffer, address = memory[:bytes], memory.data_ptr()
    pushes[address] = push

    def retire(*kept: Any) -> None:
        del pushes[address]
        _retired.append(kept)

    weakref.finalize(buffer, retire, memory, shared, push, given_up).atexit = False
    return buffer
