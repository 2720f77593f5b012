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


def make(backend: Backend) -> OnebitAdam:
    return OnebitAdam([Parameter(torch.zeros(NUMEL))], freeze_step=2, backend=backend)


def be_killed_while_saving(backend: Backend, folder: Path, milliseconds: float) -> None:
    """Rank 0 is killed, at that time after its first save; rank 1 only waits for that, as somebody must."""
    killed = folder / "killed"

    def kill() -> None:
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def save(alone: Backend) -> None:
        optimizer = make(alone)
        (p,) = optimizer.param_groups[0]["params"]
        for epoch in range(10_000):
            p.grad = torch.ones(NUMEL)
            optimizer.step()
            checkpoint.save(folder / "saved", optimizer, epoch=epoch, numbers=torch.full((NUMEL,), float(epoch)))
            if epoch == 0:
                threading.Timer(milliseconds / 1000, kill).start()

    if backend.rank == 0:
        run_threads(1, save)
    while not killed.exists():
        time.sleep(0.002)


@pytest.mark.parametrize("milliseconds", [1, 4, 9, 15, 22, 30, 41, 55])
def test_whenever_a_process_is_killed_its_checkpoint_can_be_loaded(milliseconds: float, tmp_path: Path) -> None:
    run_ranks("gloo", 2, be_killed_while_saving, tmp_path, milliseconds, without=[0])

    def load(backend: Backend) -> dict[str, Any]:
        optimizer = make(backend)
        extra = checkpoint.load(tmp_path / "saved", optimizer)
        assert optimizer.param_groups[0]["step"] == extra["epoch"] + 1
        return extra

    (extra,) = run_threads(1, load)
    assert torch.equal(extra["numbers"], torch.full((NUMEL,), float(extra["epoch"])))
