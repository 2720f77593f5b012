"""How the ranks of one run find each other."""

from __future__ import annotations

import os

import torch
import torch.distributed

from onebit.comm import make_backend
from onebit.comm.backend import Backend

TORCH_BACKENDS = ("gloo", "nccl")


def nccl_sockets() -> bool:
    """Whether NCCL was told to use TCP sockets in place of the GPUs' own links, as between hosts on an Ethernet."""
    told = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket"}
    return all(os.environ.get(name) == value for name, value in told.items())


def join(name: str | None, init_method: str | None = None) -> Backend:
    """This process's end of the group that torchrun, mpiexec or `onebit.benchmarks.launch` started it in.

    name: ``"gloo"``, ``"nccl"``, ``"mpi"`` or None: gloo when torchrun's variables are set, else this process alone.
    init_method: where ranks meet, as in `torch.distributed.init_process_group`.

    Raises:
        SystemExit: started by mpiexec without ``--backend mpi``, which would run n times alone.
    """
    if "RANK" in os.environ and name in (None, *TORCH_BACKENDS):
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = None
        if name == "nccl":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            name or "gloo", init_method=init_method, rank=rank, world_size=size, device_id=device
        )
        return make_backend(name or "gloo")
    if name is None and int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1"))) > 1:
        raise SystemExit("started by mpiexec: add --backend mpi")
    if name in TORCH_BACKENDS:
        raise SystemExit(f"--backend {name} needs ranks: torchrun --nproc-per-node 2 -m onebit.benchmarks ...")
    return make_backend(name)
