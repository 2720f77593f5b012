"""What one rank of `run_ranks` does in its process: join, call the function, write down how that ended."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from onebit.comm.backend import Backend
from onebit.comm.errors import TransportError
from onebit.comm.registry import make_backend

JOB = "job"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the ranks of one launch are to do.

    Attributes:
        kind: ``"gloo"``, ``"nccl"`` or ``"mpi"``.
        function: called as ``function(backend, *args)``.
        backend_timeout: seconds that one collective may take; over NCCL it is `timeout`.
        timeout: seconds that the whole launch may take.
    """

    kind: str
    world_size: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    backend_timeout: float
    timeout: float
    mpiexec_flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one rank ended.

    Attributes:
        value: what the function returned.
        error: the traceback if it raised.
        secondary: the error says that a peer failed, so the peer's own error is worth reading first.
    """

    value: Any = None
    error: str | None = None
    secondary: bool = False


def run_rank(folder: Path, rank: int) -> bool:
    """Do the job that lies in `folder`; false if the function raised. The outcome is whole before this returns."""
    log = os.open(folder / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    try:
        job = pickle.loads((folder / JOB).read_bytes())
        outcome = Outcome(value=job.function(_join(job, folder, rank), *job.args))
    except BaseException as error:  # whatever it was, whoever started this rank wants to know
        outcome = Outcome(error=traceback.format_exc(), secondary=isinstance(error, TransportError))
    unfinished = folder / f"outcome.{rank}.unfinished"
    unfinished.write_bytes(pickle.dumps(outcome))
    unfinished.rename(folder / f"outcome.{rank}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return outcome.error is None


def _join(job: Job, folder: Path, rank: int) -> Backend:
    if job.kind in ("gloo", "nccl"):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(job.world_size), LOCAL_WORLD_SIZE=str(job.world_size))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if job.kind == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "gloo" if job.kind == "gloo" else "cpu:gloo,cuda:nccl",
            init_method=f"file://{folder}/meeting",
            rank=rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=job.timeout),
        )
        if job.kind == "gloo":
            dist.barrier()  # else a rank that ends at once, as some tests want, could break the others' connecting
    return make_backend(job.kind, timeout=None if job.kind == "nccl" else job.backend_timeout)
