"""What a launcher such as torchrun, mpiexec or srun tells a process about the ranks beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple


class Launcher(NamedTuple):
    """The variables by which one launcher tells what ranks it has started.

    Attributes:
        world_size: its variable for the number of all ranks.
        local_world_size: its variable for the number of ranks on this machine.
        local_rank: its variable for this rank's number among those.
    """

    world_size: str
    local_world_size: str
    local_rank: str


# The first whose variables are set speaks: torchrun may itself be started by srun or mpiexec, once per machine. Slurm's
# are those of a step: a batch script sees SLURM_NTASKS too, but runs once.
LAUNCHERS = (
    Launcher("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    Launcher("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    Launcher("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    Launcher("PMI_SIZE", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    Launcher("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"),
)


def world_size_hint() -> int:
    """How many ranks the launcher says that it has started; 1 if there is none."""
    found = world_size_variable()
    return 1 if found is None else found[1]


def world_size_variable() -> tuple[str, int] | None:
    """The variable that tells the number of ranks, and that number; None: no launcher is visible."""
    return _first(lambda launcher: launcher.world_size)


def local_world_size() -> int:
    """How many ranks share this machine, this one included; 1 where nobody says so.

    Slurm tells the number per machine as a list, such as ``4(x2),3``: its largest stands for all.
    """
    found = _first(lambda launcher: launcher.local_world_size)
    return 1 if found is None else found[1]


def local_rank() -> int | None:
    """This rank's number among those on this machine, from 0; None where nobody says so."""
    for launcher in LAUNCHERS:
        number = os.environ.get(launcher.local_rank, "")
        if number.isdecimal() and _count(os.environ.get(launcher.local_world_size, "")):
            return int(number)
    return None


def _first(variable_of: Callable[[Launcher], str]) -> tuple[str, int] | None:
    for launcher in LAUNCHERS:
        variable = variable_of(launcher)
        count = _count(os.environ.get(variable, ""))
        if count:
            return variable, count
    return None


def _count(text: str) -> int:
    """The largest number in ``8`` or ``4(x2),3``; 0 if the text is not like that, for others may use the name too."""
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        return 0
    return max(int(part.partition("(")[0]) for part in text.split(","))
