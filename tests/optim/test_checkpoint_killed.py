"""A process that is killed while it saves leaves a whole checkpoint: the one before, or the new one."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam, checkpoint
from tests.comm.launcher import run_ranks

NUMEL = 200_000  # 2.4 MB a file, so that a save takes some milliseconds
MILLISECONDS = (1, 4, 9, 15, 22, 30, 41, 55)


def make(backend: Backend) -> OnebitAdam:
    return OnebitAdam([Parameter(torch.zeros(NUMEL))], freeze_step=2, backend=backend)


def be_killed_while_saving(backend: Backend, folder: Path) -> None:
    """Every rank but the last is killed, at a time of its own after its first save; the last only waits for that."""
    folders = [folder / str(after) for after in MILLISECONDS]
    if backend.rank == len(folders):
        while not all((one / "killed").exists() for one in folders):
            time.sleep(0.002)
        return
    own, after = folders[backend.rank], MILLISECONDS[backend.rank]
    own.mkdir()

    def kill() -> None:
        (own / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def save(alone: Backend) -> None:
        optimizer = make(alone)
        (p,) = optimizer.param_groups[0]["params"]
        for epoch in range(10_000):
            p.grad = torch.ones(NUMEL)
            optimizer.step()
            checkpoint.save(own / "saved", optimizer, epoch=epoch, numbers=torch.full((NUMEL,), float(epoch)))
            if epoch == 0:
                threading.Timer(after / 1000, kill).start()

    run_threads(1, save)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks have left, each in a folder named by its time; of one launch, as starting ranks takes longer."""
    folder = tmp_path_factory.mktemp("killed")
    ranks = len(MILLISECONDS)
    run_ranks("gloo", ranks + 1, be_killed_while_saving, folder, without=range(ranks), timeout=120.0)
    return folder


@pytest.mark.parametrize("milliseconds", MILLISECONDS)
def test_whenever_a_process_is_killed_its_checkpoint_can_be_loaded(milliseconds: int, killed: Path) -> None:
    def load(backend: Backend) -> dict[str, Any]:
        optimizer = make(backend)
        extra = checkpoint.load(killed / str(milliseconds) / "saved", optimizer)
        assert optimizer.param_groups[0]["step"] == extra["epoch"] + 1
        return extra

    (extra,) = run_threads(1, load)
    assert torch.equal(extra["numbers"], torch.full((NUMEL,), float(extra["epoch"])))
