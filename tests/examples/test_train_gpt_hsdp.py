"""The HSDP script trains with each kind of average over replicas and leaves one document of all of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_gpt_hsdp.py"
STEPS, DENSE = 20, 3
TINY = ["--task", "bytes", "--steps", STEPS, "--width", 32, "--layers", 1, "--heads", 2, "--context", 32]
TINY += ["--batch", 8, "--evaluations", 2, "--held-out-batches", 2]
SHARD = (256 * 32 + 12 * 32 * 32) // 2  # of the embedding and of a block's matrices


@pytest.mark.slow
def test_runs_differ_in_bytes_more_than_in_loss_and_replicas_stay_equal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", SCRIPT, *TINY]
    command += ["--averages", "fsdp", "int8", "onebit-adam", "--folder", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONEBIT_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    found = list(tmp_path.glob("*-hsdp-bytes-*.json"))
    assert len(found) == 1, done.stdout + done.stderr
    document = json.loads(found[0].read_text())
    assert document["run"]["replicas"] == 2
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == ["fsdp", "int8", "onebit-adam"]
    for name, row in rows.items():
        assert f"{name}: held-out loss {row['held_out'][-1]['loss']:.4f}" in done.stdout
        assert [point["step"] for point in row["held_out"]] == [STEPS // 2, STEPS]
        assert [point["step"] for point in row["curve"]] == [STEPS]
        # Gradients of random weights are longer than 1/10, and of so small a model shorter than 100.
        assert 0.1 < row["curve"][0]["norm"] <= row["curve"][0]["largest_norm"] < 100
        assert row["curve"][0]["loss"] > row["held_out"][-1]["loss"], name  # of all steps, the first ones included
        assert row["parameters"] == 2 * SHARD
        assert row["replicas_equal"], name
        # Twenty steps learn hardly more than which bytes there are, and no kind of average takes that away.
        assert math.isclose(row["held_out"][-1]["loss"], rows["fsdp"]["held_out"][-1]["loss"], rel_tol=0.05), name
    assert rows["fsdp"]["wire_bytes"] == STEPS * SHARD * 4
    assert rows["fsdp"]["wire_bytes"] > rows["int8"]["wire_bytes"] > rows["onebit-adam"]["wire_bytes"]
    assert rows["int8"]["wire_bytes"] >= (DENSE * 4 + STEPS - DENSE) * SHARD
