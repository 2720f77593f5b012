"""`python -m onebit.benchmarks.adam_suite`: CPUAdam against torch's implementations and, with --peers, DeepSpeed's.

One process first: one tensor in fp32 and in bf16, moments of another dtype, many small tensors, first steps of fresh
processes; then ranks that share this machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from onebit.benchmarks import adam, console, plot, record, view
from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.driver import Progress, Sweep, drive
from onebit.benchmarks.group import join
from onebit.benchmarks.launch import RankError, launch, loopback
from onebit.benchmarks.row import Row
from onebit.compress import num_threads

# Seconds of the first step of a process that has imported torch already; the second one finds what the first compiled.
FIRST_STEP = """
import time, torch
start = time.perf_counter()
from onebit.optim import CPUAdam
p = torch.nn.Parameter(torch.ones(1000))
p.grad = torch.ones(1000)
CPUAdam([p]).step()
print(time.perf_counter() - start)
"""


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.adam_suite", description=__doc__)
    flags.add_argument("--output", type=Path, default=record.default_folder(), help="folder for JSON results and plot")
    flags.add_argument("--numel", type=int, default=1 << 26, help="elements of the large tensor")
    flags.add_argument("--tensors", type=int, default=10_000, help="how many small tensors")
    flags.add_argument("-n", "--iters", type=int, default=15, help="timed rounds of each case")
    flags.add_argument("--ranks", type=int, default=2, help="ranks that share the machine; 1: leave them out")
    flags.add_argument("--peers", action="store_true", help="DeepSpeedCPUAdam as well; builds it with g++ and ninja")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all measured and right; 1: a part failed or found wrong elements, which its messages tell."""
    options = _parser().parse_args(arguments)
    wrong = _alone(options)
    if options.ranks > 1:
        flags = ["--cases=adam-ranks", f"--name=adam-ranks-{options.ranks}", f"-b{4 * options.numel}"]
        try:
            launch(loopback(options.ranks), [*flags, f"-n{options.iters}", f"--output={options.output}"])
        except RankError as error:
            console.say(f"{error}", stderr=True)
            return 1
    return 1 if wrong else 0


def _alone(options: argparse.Namespace) -> int:
    """All that one process measures; returns how many elements were wrong, those of a peer left out."""
    torch.set_num_threads(num_threads())
    run = {
        "ranks": 1,
        "backend": "single",
        "link": "this machine",
        "threads": num_threads(),
        "iterations": options.iters,
        "first_step_seconds": _first_steps(),
        "peers": {name: metadata.version(name) for name in ("deepspeed",) if options.peers},
    }
    result = record.make("adam", run, [*map(record.row_fields, _rows(options))])
    shown = view.terminal(result)
    console.show_table(view.title(result), view.columns(shown), shown)
    first = run["first_step_seconds"]
    console.say(f"first step of a fresh process, seconds, import included: {first}")
    path = record.save(result, options.output)
    console.say(f"JSON: {path}")
    console.say(f"plot: {plot.draw(result, path.with_suffix('.png'))}")
    return sum(row["wrong"] or 0 for row in result["rows"] if not row["case"].startswith(adam.DEEPSPEED.name))


def _rows(options: argparse.Namespace) -> list[Row]:
    contestants = (adam.OURS, *adam.TORCH, *((adam.DEEPSPEED,) if options.peers else ()))
    backend = join(None)
    large, small = options.numel, options.tensors * adam.MANY
    parts = [
        (adam.contest(contestants), Setting(numel=large, backend=backend)),
        (adam.contest(contestants), Setting(numel=large, backend=backend, dtype=torch.bfloat16)),
        (adam.mixed(), Setting(numel=large, backend=backend)),
        (adam.contest(contestants, many=True), Setting(numel=small, backend=backend)),
    ]
    sweep = Sweep(iterations=options.iters)
    runs = sum(len(cases) for cases, _ in parts) * sweep.runs()
    with console.progress_bar(runs, show=True) as progress:
        return [row for cases, setting in parts for row in _drive(cases, setting, sweep, progress)]


def _drive(cases: list[Case[adam.Step]], setting: Setting, sweep: Sweep, progress: Progress) -> list[Row]:
    return drive(cases, [setting], sweep, progress=progress)


def _first_steps() -> dict[str, float]:
    """With an empty cache of compiled kernels, and with a warm one."""
    with tempfile.TemporaryDirectory(prefix="onebit-") as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", FIRST_STEP]
        return {
            cache: float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
            for cache in ("empty", "warm")
        }


if __name__ == "__main__":
    sys.exit(main())
