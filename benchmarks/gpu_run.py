"""What the benchmarks on GPUs share as commands: flags, which rank and GPU this is, the result, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from onebit.benchmarks import console, record, view
from onebit.benchmarks.gpu_timing import CODEC
from onebit.benchmarks.row import Row


def flags_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """The flags that all of them have."""
    flags = argparse.ArgumentParser(prog=f"python -m onebit.benchmarks.{module}", description=description)
    flags.add_argument("--output", type=Path, default=record.default_folder(), help="folder for the JSON results")
    flags.add_argument("--mega", type=int, default=300, help="Mi elements of the largest tensor")
    flags.add_argument("-n", "--iters", type=int, default=15, help="timed rounds")
    return flags


@dataclass(frozen=True)
class Place:
    """Which of so many ranks this is, by what torchrun says, and its GPU."""

    rank: int
    ranks: int
    device: torch.device

    @staticmethod
    def taken() -> Place:
        """This rank's; its GPU is the current device from now on."""
        rank, ranks, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        return Place(rank, max(ranks, 1), device)


def report(name: str, ranks: int, rounds: int, rows: Sequence[Row], folder: Path, **figures: object) -> None:
    """Save the document of a run and print its table; `figures` stand beside what describes the run."""
    fields = [record.row_fields(row) for row in rows]
    result = record.make(name, {**_run(ranks, rounds), **figures}, fields, "cuda")
    record.save(result, folder)
    cells = view.terminal(result)
    console.show_table(view.title(result), view.columns(cells), cells)


def status(rows: Sequence[Row]) -> int:
    """0: everything was right; 1: something was wrong."""
    return min(sum(row.wrong or 0 for row in rows), 1)


def leave(rows: Sequence[Row]) -> NoReturn:
    """End the process with its status, past NCCL's own clean-up, which waits for captured graphs."""
    sys.stdout.flush()
    os._exit(status(rows))


def _run(ranks: int, rounds: int) -> dict[str, object]:
    return {
        "ranks": ranks,
        "backend": "nccl" if ranks > 1 else "single",
        "link": "the GPUs' own links",
        "kernels": CODEC.kernels_on("cuda"),
        "iterations": rounds,
    }
