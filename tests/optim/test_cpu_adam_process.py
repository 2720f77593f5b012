"""The first step of a fresh machine: no compiler, no build tool, an empty cache; later processes only load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import torch
from onebit.optim import CPUAdam
p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 1001)) for _ in range(2))
p.grad, q.grad = torch.ones(1001), torch.ones(1001)
CPUAdam([p]).step()
torch.optim.AdamW([q]).step()
torch.testing.assert_close(p, q)
"""


def run(cache: Path, nowhere: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX", "CUDA_HOME")}
    environment |= {"PATH": str(nowhere), "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", STEP], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.slow
def test_steps_with_nothing_in_path_and_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    cache, nowhere = tmp_path / "cache", tmp_path / "nowhere"
    nowhere.mkdir()
    run(cache, nowhere)
    compiled = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb*")}
    assert {path.name.split(".")[1].split("-")[0] for path in compiled} == {"count_steps", "update_words"}
    run(cache, nowhere)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb*")} == compiled
