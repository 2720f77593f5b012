"""The example that plots in TensorBoard leaves curves that TensorBoard can read, on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "log_metrics.py"
STEPS = 40


@pytest.mark.slow
def test_every_rank_leaves_its_curves(tmp_path: Path) -> None:
    readers = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(EXAMPLE), "--folder", str(tmp_path), "--steps", str(STEPS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert any(tmp_path.iterdir()), run.stderr
    for rank in range(2):
        curves = readers.EventAccumulator(str(tmp_path / f"rank-{rank}"))
        curves.Reload()
        assert {"loss", "onebit/wire_bytes", "onebit/residual_norm"} <= set(curves.Tags()["scalars"])
        assert [event.value for event in curves.Scalars("onebit/step")] == list(range(10, STEPS + 1, 10))
        errors = {event.step: event.value for event in curves.Scalars("onebit/compression_error")}
        assert errors.keys() == {10, 20, 30, 40}  # the variance is frozen after step 8
        assert all(0 < error < 1 for error in errors.values())
