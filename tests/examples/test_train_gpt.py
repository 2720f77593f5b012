"""The training script finishes under every launcher, leaves a complete record, and keeps its ranks equal."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_gpt.py"
STEPS, FREEZE_STEP = 10, 6
TINY = ["--steps", STEPS, "--freeze-step", FREEZE_STEP, "--width", 32, "--layers", 1, "--heads", 2]
TINY += ["--context", 32, "--batch", 4, "--lr", 0.001]
ELEMENTS = 256 * 32 + 12 * 32 * 32  # embedding, attention and feed-forward matrices: 20 blocks of 1024 elements
DENSE, PACKED = ELEMENTS * 4, ELEMENTS // 8 + ELEMENTS // 1024 * 4
PHASES = ["warmup"] * FREEZE_STEP + ["compressed"] * (STEPS - FREEZE_STEP)
# Beside the payload: alignment to 16 bytes, a flag per parameter in warm-up, what ranks compare when a phase begins.
AT_MOST_BESIDE = 256


def alone() -> list[str]:
    return [sys.executable]


def torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def mpiexec() -> list[str]:
    pytest.importorskip("mpi4py")
    beside = Path(sys.executable).with_name("mpiexec")
    program = str(beside) if beside.exists() else shutil.which("mpiexec")
    if program is None:
        pytest.skip("no mpiexec")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    root_on_few_cores = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version else []
    return [program, *root_on_few_cores, "-n", "2", sys.executable]


def train(launcher: list[str], record: Path, *options: object) -> dict[str, Any]:
    """The record that the script leaves. Whether a rank then aborts while Python shuts down does not matter here."""
    command = [str(part) for part in (*launcher, SCRIPT, "--output", record, *TINY, *options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert record.exists(), f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    contents: dict[str, Any] = json.loads(record.read_text())
    return contents


def assert_complete(record: dict[str, Any], world_size: int) -> None:
    assert record["environment"]["world_size"] == world_size
    assert record["parameters"] == ELEMENTS
    for column in ("loss", "phase", "wire_bytes", "seconds", "update_seconds"):
        assert len(record[column]) == STEPS
    for column in ("loss", "seconds", "update_seconds"):
        assert all(math.isfinite(value) for value in record[column])
    assert math.isfinite(record["held_out_loss"])


def test_alone_it_trains_and_sends_nothing(tmp_path: Path) -> None:
    record = train(alone(), tmp_path / "record.json")
    assert_complete(record, world_size=1)
    assert record["phase"] == PHASES
    assert record["wire_bytes"] == [0] * STEPS


@pytest.mark.parametrize(
    ("launcher", "options", "backend"),
    [
        pytest.param(torchrun, [], "gloo", id="torchrun"),
        pytest.param(mpiexec, ["--backend", "mpi"], "mpi", id="mpiexec", marks=pytest.mark.mpi),
    ],
)
def test_two_ranks_end_with_one_model_and_send_one_bit_per_number_after_the_freeze(
    launcher: Callable[[], list[str]], options: list[str], backend: str, tmp_path: Path
) -> None:
    record = train(launcher(), tmp_path / "record.json", *options)
    assert_complete(record, world_size=2)
    assert record["environment"]["backend"] == backend
    assert record["phase"] == PHASES
    for phase, sent in zip(PHASES, record["wire_bytes"], strict=True):
        payload = DENSE if phase == "warmup" else PACKED
        assert payload <= sent <= payload + AT_MOST_BESIDE
    assert len(record["checksums"]) == 2
    assert len(set(record["checksums"])) == 1, "ranks ended with different parameters"


def test_plain_adamw_averages_dense_gradients_in_every_step(tmp_path: Path) -> None:
    record = train(torchrun(), tmp_path / "record.json", "--optimizer", "adamw")
    assert_complete(record, world_size=2)
    assert record["phase"] == ["dense"] * STEPS
    assert record["wire_bytes"] == [DENSE] * STEPS
    assert len(set(record["checksums"])) == 1, "ranks ended with different parameters"
