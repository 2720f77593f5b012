"""Does training on about one bit per number end where plain training ends? Runs, a picture per task, and a table.

    python examples/study.py run --tasks bytes digits --jobs 8           # CPU, ranks as threads; skips what is there
    torchrun --nproc-per-node 2 examples/study.py train --task gpt --ranks 2 --optimizer adamw onebit-adam --compile
    python examples/study.py report                                      # out/study/*.json -> docs/

A run leaves one JSON file, when it is complete. Settings of the recipes can be changed, as in ``--steps 100``. On a
machine without scikit-learn the digits are read from out/digits.npz, which `study.py digits` writes on one that has it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from queue import Queue

from study_plan import LABELS, RECIPES, USUAL, Run, flags, plan

FOLDER = Path("out/study")
IDENTITY = {"task", "optimizer", "ranks", "seed"}  # of a run; its other fields are settings


def main() -> int:
    options = parse()
    code: int = options.command(options)
    return code


def run(options: argparse.Namespace) -> int:
    """Make all runs that have no record yet, some side by side, each on one core and in a process of its own."""
    planned = plan(options.tasks, options.optimizers, options.ranks, options.seeds, changes(options))
    todo = [one for one in planned if not record_of(one, options.folder).exists()]
    cores = sorted(os.sched_getaffinity(0))
    free: Queue[int] = Queue()
    for slot in range(options.jobs):
        free.put(cores[slot % len(cores)])

    def make(one: Run) -> bool:
        core = free.get()
        command = [sys.executable, __file__, "train", *flags(one), f"--folder={options.folder}"]
        done = subprocess.run(
            command,
            env=one_thread(),
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            capture_output=True,
            text=True,
        )
        free.put(core)
        made = record_of(one, options.folder).exists()
        print(done.stdout.strip() if made else f"{one.name} FAILED, code {done.returncode}:\n{done.stderr}", flush=True)
        return made

    print(f"{len(todo)} of {len(planned)} runs to make, {options.jobs} side by side", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        return 0 if all(list(pool.map(make, todo))) else 1


def train(options: argparse.Namespace) -> int:
    """Make runs of one task in this process, or as one rank of them under torchrun."""
    from study_train import make_runs  # here, because torch is slow to import and `run` does not need it

    runs = plan([options.task], options.optimizer, [options.ranks], options.seed, changes(options))
    make_runs(runs, options.folder, options.compile)
    return 0


def report(options: argparse.Namespace) -> int:
    """Draw the pictures and write the table of all records."""
    from study_report import write_report

    for path in write_report(options.folder, options.docs):
        print(path)
    return 0


def digits(options: argparse.Namespace) -> int:
    """Write scikit-learn's digits to a file that can travel."""
    from study_tasks import save_digits

    print(save_digits())
    return 0


def record_of(one: Run, folder: Path) -> Path:
    """Where a run's record is once it is complete."""
    return folder / f"{one.name}.json"


def one_thread() -> dict[str, str]:
    """This process's environment with one thread for everything."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "ONEBIT_NUM_THREADS": "1"}


def changes(options: argparse.Namespace) -> dict[str, object]:
    """The settings given on the command line."""
    names = [f.name for f in fields(Run) if f.name not in IDENTITY]
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for every setting of a run."""
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the records")
    for setting in fields(Run):
        if setting.name not in IDENTITY:
            kind = {"int": int, "float": float}[str(setting.type)]
            parser.add_argument(f"--{setting.name.replace('_', '-')}", type=kind, help="default: the recipe's")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    side = commands.add_parser("run", help=run.__doc__)
    side.set_defaults(command=run)
    side.add_argument("--tasks", nargs="+", choices=RECIPES, default=["bytes", "digits"])
    side.add_argument("--optimizers", nargs="+", choices=LABELS, default=list(USUAL))
    side.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    side.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    side.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    add_settings(side)
    single = commands.add_parser("train", help=train.__doc__)
    single.set_defaults(command=train)
    single.add_argument("--task", choices=RECIPES, required=True)
    single.add_argument("--optimizer", nargs="+", choices=LABELS, required=True)
    single.add_argument("--ranks", type=int, required=True, help="under torchrun: what --nproc-per-node says")
    single.add_argument("--seed", nargs="+", type=int, default=[0])
    single.add_argument("--compile", action="store_true", help="with torch.compile")
    add_settings(single)
    drawn = commands.add_parser("report", help=report.__doc__)
    drawn.set_defaults(command=report)
    drawn.add_argument("--folder", type=Path, default=FOLDER, help="of the records")
    drawn.add_argument("--docs", type=Path, default=Path("docs"), help="where pictures and table go")
    commands.add_parser("digits", help=digits.__doc__).set_defaults(command=digits)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
