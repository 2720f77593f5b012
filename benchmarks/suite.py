"""`python -m onebit.benchmarks.suite`: the figures that anybody can reproduce in minutes, on the CPUs at hand.

Kernels alone, then averages over ranks that share this machine and its loopback interface, then first calls.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from onebit.benchmarks import console, first_call, record
from onebit.benchmarks.launch import RankError, launch, loopback
from onebit.benchmarks.sizes import parse_size, up_to


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.suite", description=__doc__)
    flags.add_argument("--output", type=Path, default=record.default_folder(), help="folder for the JSON results")
    flags.add_argument("--kernel-size", default="256M", help="bytes of the tensor that kernels run on")
    flags.add_argument(
        "--average-size", type=parse_size, default="64M", help="bytes of the largest tensor that is averaged"
    )
    flags.add_argument("-n", "--iters", type=int, help="timed runs of each case (kernels 12, averages 20)")
    flags.add_argument("--ranks", type=int, default=2, help="ranks that average")
    flags.add_argument("--repeats", type=int, default=3, help="fresh processes per state of the compile cache; 0: none")
    flags.add_argument("--plot", action="store_true", help="draw the JSON results, beside them")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all measured and right; 1: a part failed or found wrong elements, which its messages tell."""
    options = _parser().parse_args(arguments)
    output = [f"--output={options.output}", *["--plot"] * options.plot]
    statuses = [
        _kernels([f"-b{options.kernel_size}", f"-n{options.iters or 12}", *output]),
        _averages(options.ranks, [*up_to(options.average_size), f"-n{options.iters or 20}", *output]),
    ]
    if options.repeats:
        statuses.append(first_call.main([f"--repeats={options.repeats}", f"--output={options.output}"]))
    return max(statuses)


def _kernels(arguments: Sequence[str]) -> int:
    """The kernels and their yardsticks, in a process of their own."""
    command = [sys.executable, "-m", "onebit.benchmarks", "--cases=kernels", "--name=kernels", *arguments]
    return min(1, abs(subprocess.run(command).returncode))


def _averages(ranks: int, arguments: Sequence[str]) -> int:
    """The collectives, the modes and the stages of ours on Gloo over loopback."""
    try:
        launch(loopback(ranks), ["--cases=collectives,modes,stages", "--link=loopback", *arguments])
    except RankError as error:
        console.say(f"{error}", stderr=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
