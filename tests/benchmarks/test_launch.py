"""Ranks as processes: they meet, a failure of one is told and ends the others, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onebit.benchmarks import launch, record, suite
from onebit.benchmarks.launch import Host, RankError


def shell(script: str) -> Host:
    """A host on which `script` runs in place of the rank."""
    return Host(prefix=("sh", "-c", script))


def alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_suite_measures_kernels_and_two_gloo_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ["--kernel-size=64K", "--average-size=64K", "-n2", "--repeats=0"]
    assert suite.main([*small, f"--output={tmp_path}"]) == 0
    found = {document["name"]: document for document in map(record.load, tmp_path.glob("*.json"))}
    assert found.keys() == {"kernels", "gloo-2"}
    assert found["gloo-2"]["run"]["ranks"] == 2
    assert all(row["wrong"] == 0 for document in found.values() for row in document["rows"])
    assert "compressed" in capfd.readouterr().out


def test_a_failed_rank_is_named_and_ends_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    pid = tmp_path / "pid"
    with pytest.raises(RankError, match="rank 1 ended with status 3"):
        launch.launch([shell(f"echo $$ > {pid}; exec sleep 60"), shell("sleep 0.5; exit 3")], [])
    assert not alive(int(pid.read_text()))


def test_a_signal_that_ends_a_rank_is_named() -> None:
    with pytest.raises(RankError, match="rank 0 ended with signal SIGABRT"):
        launch.launch([shell("kill -ABRT $$")], [])


def test_ranks_are_told_their_number_and_the_number_of_ranks_here(tmp_path: Path) -> None:
    script = f"echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE > {tmp_path}/$RANK"
    launch.launch([shell(script)] * 3, [])
    assert [(tmp_path / f"{rank}").read_text().split() for rank in range(3)] == [
        [f"{rank}", "3", f"{rank}", "3"] for rank in range(3)
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_leaves_no_rank_behind(number: signal.Signals, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = (
        "from onebit.benchmarks.launch import Host, launch\n"
        f"launch([Host(prefix=('sh', '-c', 'echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60'))], [])"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 30
    while not pid.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) != 0
    assert not alive(int(pid.read_text()))
