"""The convergence study makes each run once, leaves complete records, and tabulates and draws them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STUDY = Path(__file__).parents[2] / "examples" / "study.py"
STEPS = 20
TINY = [f"--steps={STEPS}", "--width=32", "--layers=1", "--heads=2", "--context=32", "--batch=4", "--evaluations=4"]
EVERYTHING = ["adamw", "onebit-adam", "onebit-adam-auto", "zero-one-adam", "lamb", "onebit-lamb", "onebit-lamb-steady"]

MARKS = """<!-- examples/study.py report: optimizers -->
old
<!-- end -->
<!-- examples/study.py report: codecs -->
kept
<!-- end -->
"""


def study(*arguments: object, launcher: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *launcher, str(STUDY), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_runs_are_made_once_side_by_side_and_end_in_a_table_and_a_picture(tmp_path: Path) -> None:
    folder, docs = tmp_path / "records", tmp_path / "docs"
    settings = ["--tasks", "bytes", "--ranks", 2, "--seeds", 0, "--jobs", 2, "--folder", folder, *TINY]
    one_by_one = ["--optimizer", *EVERYTHING[1:-1], "--folder", folder, *TINY]  # in one process, which takes less time
    study("train", "--task", "bytes", "--ranks", 2, "--seed", 0, *one_by_one)
    assert "2 of 7 runs to make" in study("run", *settings)
    found = records(folder)
    assert set(found) == {f"bytes-2ranks-{name}-seed0" for name in EVERYTHING}
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "0 of 7 runs to make" in study("run", *settings)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    sent = {}
    for name, record in found.items():
        for column in ("loss", "phase", "wire_bytes", "collectives", "seconds"):
            assert len(record[column]) == STEPS, (name, column)
        assert [step for step, _ in record["held_out"]] == [5, 10, 15, 20]
        assert record["held_out"][-1][1] == record["held_out_loss"]
        assert len(record["checksums"]) == 2
        assert len(set(record["checksums"])) == 1, f"{name}: ranks ended with different parameters"
        sent[record["options"]["optimizer"]] = sum(record["wire_bytes"])
    assert found["bytes-2ranks-adamw-seed0"]["loss"][0] == found["bytes-2ranks-lamb-seed0"]["loss"][0], "same start"
    for plain, packed in (("adamw", "onebit-adam"), ("onebit-adam", "zero-one-adam"), ("lamb", "onebit-lamb")):
        assert sent[packed] < sent[plain]

    docs.mkdir()
    page = docs / "convergence.md"
    page.write_text("before\n" + MARKS + "after\n")
    for _ in range(2):  # what was made is replaced
        study("report", "--folder", folder, "--docs", docs)
    before_codecs, _, rest = page.read_text().partition("<!-- examples/study.py report: codecs -->\n")
    assert rest == "kept\n<!-- end -->\nafter\n", "no run was about codecs"
    lines = before_codecs.splitlines()
    assert lines[0] == "before"
    assert "old" not in lines
    assert len([line for line in lines if line.startswith("| bytes |")]) == len(EVERYTHING)
    assert "![Held-out loss on bytes](convergence-bytes.png)" in lines
    assert {path.name for path in docs.glob("*.png")} == {"convergence-bytes.png"}


@pytest.mark.slow
def test_codecs_and_two_levels_have_a_table_and_a_picture_of_their_own(tmp_path: Path) -> None:
    names = ["adamw", "adamw-int8", "onebit-adam", "onebit-adam-int4-stochastic", "onebit-adam-two-level"]
    tiny = ["--folder", tmp_path, *TINY]
    study("train", "--task", "bytes", "--ranks", 4, "--optimizer", *names, *tiny)
    study("train", "--task", "bytes", "--ranks", 2, "--optimizer", *names, *tiny)
    found = records(tmp_path)
    assert set(found) == {f"bytes-4ranks-{n}-seed0" for n in names} | {f"bytes-2ranks-{n}-seed0" for n in names[:-1]}
    sent = {name: sum(record["wire_bytes"]) for name, record in found.items()}
    of_four = [sent[f"bytes-4ranks-{name}-seed0"] for name in names]
    assert of_four[4] < of_four[2] < of_four[3] < of_four[0], "two levels: what left the node"
    assert of_four[1] < of_four[0] / 3.9, "all steps in a quarter of the bits"
    (tmp_path / "convergence.md").write_text(MARKS)
    study("report", "--folder", tmp_path, "--docs", tmp_path)
    optimizers, _, codecs = (tmp_path / "convergence.md").read_text().partition("report: codecs -->")
    assert "int4" not in optimizers
    assert codecs.count("| bytes |") == len(found)
    assert "![Held-out loss on bytes](convergence-bytes-codecs.png)" in codecs
    assert (tmp_path / "convergence-bytes-codecs.png").stat().st_size > 0


@pytest.mark.slow
def test_under_torchrun_processes_are_ranks(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    optimizers = ["adamw", "onebit-lamb"]
    study(
        *("train", "--task", "bytes", "--ranks", 2, "--optimizer", *optimizers, "--folder", tmp_path, *TINY),
        launcher=launcher,
    )
    found = records(tmp_path)
    assert len(found) == 2
    assert {record["environment"]["backend"] for record in found.values()} == {"gloo"}
    assert {record["environment"]["world_size"] for record in found.values()} == {2}


def test_the_digits_train_from_the_file_that_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np = pytest.importorskip("numpy")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 17, (60, 8, 8), np.uint8), draw.integers(0, 10, 60, np.uint8)
    np.savez_compressed(tmp_path / "out" / "digits.npz", images=images, labels=labels)
    shadow = tmp_path / "sklearn"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    study("train", "--task", "digits", "--ranks", 2, "--optimizer", "onebit-adam", "--folder", tmp_path, "--steps=10")
    (record,) = records(tmp_path).values()
    assert len(record["loss"]) == 10
