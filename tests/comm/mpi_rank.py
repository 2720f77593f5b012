"""The program that mpiexec starts for every rank of `run_ranks`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.comm.rank import run_rank

if __name__ == "__main__":
    number = next(os.environ[name] for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK") if name in os.environ)
    if not run_rank(Path(sys.argv[1]), int(number)):
        os._exit(1)  # MPI_Finalize would wait for the other ranks; mpiexec now ends them
