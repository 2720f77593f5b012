"""Train the same transformer twice over 2 ranks, with plain AdamW and with OnebitAdam, and compare loss and bytes.

    python examples/demo.py

Prints a table; leaves under out/demo/ a picture of both loss curves and the records of the runs.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

from plot import plot
from record import Record
from rich.console import Console
from table import summary, table

SCRIPT = Path(__file__).with_name("train_gpt.py")
LABELS = {"adamw": "plain AdamW", "onebit-adam": "OnebitAdam"}


def main() -> int:
    options, training = parse()
    console = Console()
    records = {}
    for optimizer, label in LABELS.items():
        console.rule(f"{label}, {options.ranks} ranks")
        record = run(optimizer, options.output / f"{optimizer}.json", options.ranks, training)
        if record is None:
            return 1
        records[label] = record
    picture = options.output / "loss.png"
    plot(records, picture)
    console.print(table(records))
    console.print(summary(records))
    console.print(f"picture: {picture}\nrecords: {options.output}{os.sep}*.json", soft_wrap=True, highlight=False)
    return 0


def run(optimizer: str, output: Path, ranks: int, training: list[str]) -> Record | None:
    """Run the training script over `ranks` processes; None, said on stderr, if it did not finish or went wrong.

    What counts is the record, which is written when all ranks are done and not before: with some versions of torch a
    Gloo process that has finished its work aborts while Python shuts down.
    """
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(SCRIPT), "--optimizer", optimizer, "--output", str(output), *training]
    code = subprocess.run(command, env=environment(ranks), check=False).returncode
    if not output.exists():
        print(f"{optimizer}: the training script ended with code {code} and left no record", file=sys.stderr)
        return None
    if code != 0:
        print(f"{optimizer}: a rank aborted (code {code}) after the run was complete and recorded", file=sys.stderr)
    record = Record.read(output)
    if fault := find_fault(record):
        print(f"{optimizer}: {fault}", file=sys.stderr)
        return None
    return record


def find_fault(record: Record) -> str | None:
    """What is wrong with a complete run, in words; None if nothing is."""
    if not all(math.isfinite(loss) for loss in (*record.loss, record.held_out_loss)):
        return "the loss is not finite"
    if not record.ranks_agree:
        return f"the ranks ended with different parameters, checksums {record.checksums}"
    return None


def environment(ranks: int) -> dict[str, str]:
    """This process's environment, with the cores shared out among the ranks."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The demo's own options, and those that go on to the training script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other options go to train_gpt.py.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for picture and records")
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
