"""The benchmark commands of the documentation run, at a small size."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.comm.launcher import needs_mpi
from tests.docs.blocks import ENVIRONMENT, commands, runnable

# Those that measure for minutes whatever the size, and those that need results, have tests in tests/benchmarks.
SIZES = re.compile(r" -[bef] \w+")
COMMANDS = [
    pytest.param(command, marks=[pytest.mark.mpi, needs_mpi] if command.startswith("mpiexec") else [])
    for command in sorted(
        {SIZES.sub("", c) for _, c in commands() if re.search(r"-m onebit\.benchmarks( -(?!-help)|$)", c)}
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_command_runs_at_a_small_size(command: str, tmp_path: Path) -> None:
    run = subprocess.run(
        runnable(f"{command} -b 64K -n 2 -w 1"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        env=ENVIRONMENT,
        check=False,
    )
    # Gloo in torch 2.13 sometimes aborts when the interpreter exits; by then the table, which comes last, is printed.
    assert run.returncode == 0 or "wrong" in run.stdout, run.stdout + run.stderr
    assert "#wrong" in run.stdout
