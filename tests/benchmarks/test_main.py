"""The command: an element that is wrong shows in its exit status and its table, and results name what they ran with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import onebit.benchmarks.__main__ as command
from onebit.benchmarks import record, select
from onebit.benchmarks.case import Case

FLAGS = ["-b4K", "-n2", "-w1", "--backend=threads"]


def test_a_planted_error_is_shown_and_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planted(names: tuple[str, ...]) -> list[list[Case[Any]]]:
        [[case]] = select(names)

        def broken(state: Any) -> None:
            case.run(state)
            state.tensor[0] += 1.0

        return [[dataclasses.replace(case, run=broken)]]

    assert command.main([*FLAGS, "--cases=compressed"]) == 0
    monkeypatch.setattr(command, "select", planted)
    assert command.main([*FLAGS, "--cases=compressed"]) == 1
    assert capsys.readouterr().out.rstrip().endswith(" 2")  # on both ranks


def test_a_result_tells_codec_kernels_and_counts(tmp_path: Path) -> None:
    flags = ["--cases=stages", "--codec=block_size=64,kernels=reference", "-m2", f"--output={tmp_path}"]
    assert command.main([*FLAGS, *flags]) == 0
    [path] = tmp_path.glob("*.json")
    run = record.load(path)["run"]
    assert "block_size=64" in run["codec"]
    assert (run["kernels"], run["together"], run["graph"]) == ("reference", 2, False)
