"""What each launcher says about the ranks, and what is no launcher's word."""

from __future__ import annotations

import pytest

from onebit.compress.launch_env import LAUNCHERS, local_world_size, world_size_hint, world_size_variable


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in sum(LAUNCHERS, ()):
        monkeypatch.delenv(variable, raising=False)


def test_without_a_launcher_there_is_one_rank() -> None:
    assert (world_size_hint(), local_world_size(), world_size_variable()) == (1, 1, None)


@pytest.mark.parametrize(
    ("variables", "world", "local"),
    [
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 16, 8),
        ({"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 6, 3),
        ({"PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, 4, 2),
        ({"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_SIZE": "2"}, 4, 2),
        ({"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 11, 4),
        # torchrun once per machine under srun: its ranks count, not srun's.
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "WORLD_SIZE": "16",
                "LOCAL_WORLD_SIZE": "8",
            },
            16,
            8,
        ),
        # A Slurm batch script knows of the job's tasks, and is one process.
        ({"SLURM_NTASKS": "64", "SLURM_NTASKS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "8(x8)"}, 1, 1),
        ({"WORLD_SIZE": "everything", "LOCAL_WORLD_SIZE": ""}, 1, 1),
        ({"WORLD_SIZE": "-3", "LOCAL_WORLD_SIZE": "0"}, 1, 1),
    ],
)
def test_launchers(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], world: int, local: int) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (world_size_hint(), local_world_size()) == (world, local)
