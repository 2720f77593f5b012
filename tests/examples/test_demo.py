"""The demo compares two finished runs, forgives an abort after the work, and forgives no failure."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
TINY = ["--steps=8", "--freeze-step=5", "--width=32", "--layers=1", "--heads=2", "--context=32", "--batch=4"]
ABORT_AT_EXIT = "import atexit, os\nif 'LOCAL_RANK' in os.environ: atexit.register(os.abort)\n"


def demo(output: Path, *options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(DEMO), "--output", str(output), *TINY, *options]
    environment = {**os.environ, "PYTHONPATH": search}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_an_abort_while_python_shuts_down_is_told_but_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABORT_AT_EXIT)
    done = demo(tmp_path / "out", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "aborted" in done.stderr
    assert "loss ratio" in done.stdout
    assert "byte ratio" in done.stdout
    for name in ("adamw.json", "onebit-adam.json", "loss.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_a_run_that_fails_fails_the_demo_and_an_old_record_does_not_hide_it(tmp_path: Path) -> None:
    (tmp_path / "adamw.json").write_text("{}")
    done = demo(tmp_path, "--heads", "5", "--ranks", "1")
    assert done.returncode == 1
    assert "no record" in done.stderr
    assert "loss ratio" not in done.stdout


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ({}, None),
        ({"loss": [4.0, float("nan")]}, "not finite"),
        ({"held_out_loss": float("inf")}, "not finite"),
        ({"checksums": [1, 2]}, "different parameters"),
    ],
)
def test_a_complete_run_that_went_wrong_is_a_failure(
    damage: dict[str, Any], fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DEMO.parent))
    find_fault = importlib.import_module("demo").find_fault
    record_type = importlib.import_module("record").Record
    sound = {"options": {}, "environment": {}, "parameters": 1, "loss": [4.0, 3.0], "held_out_loss": 3.0}
    found = find_fault(record_type(**{**sound, "checksums": [1, 1], **damage}))
    assert found is None if fault is None else fault in found
