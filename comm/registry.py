"""Resolves what a user names as a backend, a name, a process group or a communicator, to a `Backend`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from onebit.comm.backend import Backend
from onebit.comm.errors import BackendError
from onebit.comm.mpi_backend import MpiBackend
from onebit.comm.single_backend import SingleBackend
from onebit.comm.threads_backend import ThreadsBackend
from onebit.comm.torch_backend import NAMES, TorchBackend, as_member
from onebit.compress.launch_env import world_size_variable


def make_backend(
    spec: object = None, *, device: torch.device | str | None = None, timeout: float | None = None
) -> Backend:
    """The backend that `spec` names.

    Each call makes a new object, whose traffic count is its own, except where `spec` is a Backend already.

    Args:
        spec: ``"gloo"`` or ``"nccl"`` (torch.distributed's default group), ``"mpi"`` (``COMM_WORLD``), ``"single"``
            (this rank alone), a torch.distributed process group, an mpi4py communicator, or a Backend, which is
            returned. None: inside `run_threads` that rank's backend; else the default group if torch.distributed is
            initialised; else this process alone, unless a launcher has started others.
        device: where the tensors are; it chooses between the Gloo and the NCCL half of a group that has both. None: cpu
            if the group can carry it.
        timeout: seconds that a collective may take; None: `DEFAULT_TIMEOUT`, over NCCL what the group has. Over NCCL it
            becomes the limit of whatever uses that group, and what exceeds it ends the process (PyTorch's watchdog).

    Raises:
        BackendError: unknown, not available, not initialised, or not for that device; the message has the remedy.
        TransportError: ``"mpi"``: not every rank of the communicator made its backend within the timeout.
    """
    device_type = None if device is None else torch.device(device).type
    backend = _resolve(spec, device_type, timeout)
    if device is not None and not backend.carries(torch.device(device)):
        raise BackendError(
            f"rank {backend.rank}: the {backend.name!r} backend carries {backend.carried} tensors, and these are "
            f"on {device}; move them, or name a backend for {device_type}"
        )
    return backend


def depends_on_device(spec: object) -> bool:
    """Whether the device of the tensors tells which backend `spec` means: None, or a group that may have halves."""
    return spec is None or isinstance(spec, dist.ProcessGroup)


def _resolve(spec: object, device_type: str | None, timeout: float | None) -> Backend:
    if isinstance(spec, Backend):
        if timeout is not None and timeout != spec.timeout:
            raise BackendError(
                f"this backend has a timeout of {spec.timeout} s, not {timeout}; make one with timeout={timeout}"
            )
        return spec
    if spec is None:
        return _find(device_type, timeout)
    if isinstance(spec, str):
        if spec not in BACKENDS:
            raise BackendError(f"no backend is named {spec!r}; there are {', '.join(map(repr, BACKENDS))}")
        return BACKENDS[spec](timeout)
    if isinstance(spec, dist.ProcessGroup) or _is_no_member(spec):
        return _of_group(spec, device_type, timeout)
    mpi = sys.modules.get("mpi4py.MPI")  # who has a communicator has imported it
    if mpi is not None and isinstance(spec, mpi.Comm):
        return MpiBackend(spec, timeout)
    raise BackendError(
        f"a backend is None, one of {', '.join(map(repr, BACKENDS))}, a torch.distributed process group, an mpi4py "
        f"communicator or a Backend; got {spec!r} of type {type(spec).__name__}"
    )


def _find(device_type: str | None, timeout: float | None) -> Backend:
    """What a rank that names nothing most likely means."""
    current = ThreadsBackend.current()
    if current is not None:
        return current
    if dist.is_initialized():
        return _of_group(dist.group.WORLD, device_type, timeout)
    launched = world_size_variable()
    if launched is not None and launched[1] > 1:
        variable, size = launched
        raise BackendError(
            f"a launcher has started {size} ranks ({variable}={size}) but torch.distributed is not initialised: each "
            "would train alone. Call torch.distributed.init_process_group() first, or pass backend='mpi' under "
            "mpiexec, or backend='single' if each rank does train alone"
        )
    return SingleBackend(timeout)


def _of_group(group: object, device_type: str | None, timeout: float | None) -> TorchBackend:
    """The half of a process group that carries tensors of this device."""
    group = as_member(group)
    halves = _halves(group)
    wanted = device_type or next(iter(halves), "cpu")
    if wanted not in halves:
        name = NAMES.get(wanted)
        remedy = (
            f"pass a group made by torch.distributed.new_group(backend={name!r})"
            if name
            else f"tensors must be on {' or '.join(NAMES)}"
        )
        has = dist.get_backend_config(group)
        raise BackendError(f"rank {group.rank()}: this process group ({has}) cannot carry {wanted} tensors; {remedy}")
    return TorchBackend(group, wanted, timeout)


def _is_no_member(spec: object) -> bool:
    """Whether this is what new_group returns on the other ranks, a number."""
    return isinstance(spec, int) and spec == dist.GroupMember.NON_GROUP_MEMBER


def _halves(group: dist.ProcessGroup) -> list[str]:
    """The device types that this group can carry with a transport of ours, cpu first."""
    config = dict(part.split(":") for part in str(dist.get_backend_config(group)).split(","))
    return [device for device, name in NAMES.items() if config.get(device) == name]


def _named(name: str, device_type: str) -> Callable[[float | None], Backend]:
    """Makes the backend of that name on torch.distributed's default group."""

    def make(timeout: float | None) -> Backend:
        if device_type == "cuda" and not torch.cuda.is_available():
            raise BackendError(f"the {name!r} backend needs a CUDA device and PyTorch sees none; use 'gloo' or 'mpi'")
        if not dist.is_initialized():
            raise BackendError(
                f"the {name!r} backend needs torch.distributed: add torch.distributed.init_process_group({name!r}) and "
                "start the script with torchrun"
            )
        return _of_group(dist.group.WORLD, device_type, timeout)

    return make


def _mpi(timeout: float | None) -> Backend:
    backend = MpiBackend(timeout=timeout)
    launched = world_size_variable()
    if backend.size == 1 and launched is not None and launched[1] > 1:
        raise BackendError(
            f"a launcher has started {launched[1]} ranks ({launched[0]}={launched[1]}) but MPI sees one, so each would "
            "train alone. Start the script with the mpiexec of the MPI library that mpi4py uses, which "
            "'python -m mpi4py --mpi-library' shows"
        )
    return backend


def _threads(timeout: float | None) -> Backend:
    current = ThreadsBackend.current()
    if current is None:
        raise BackendError("'threads' has ranks only inside onebit.comm.run_threads(world_size, function)")
    return current


# A new transport is a file beside this one and a line here: its name, and what makes it, given a timeout or None.
BACKENDS: dict[str, Callable[[float | None], Backend]] = {
    "gloo": _named("gloo", "cpu"),
    "nccl": _named("nccl", "cuda"),
    "mpi": _mpi,
    "threads": _threads,
    "single": SingleBackend,
}
