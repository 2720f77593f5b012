"""What fault checks cost: OnebitAdam's compressed step with them and without, in turns.

    torchrun --nproc-per-node 2 -m onebit.benchmarks.guard_cost [--device cuda] [--numel 67108864] [--output FOLDER]

Only here can they be left out: whether all numbers are finite, whether options and gradients can be averaged, the guard
around every collective, and what it says of those that were given up. Nothing that is read here is bad, so both kinds
of steps do the same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import Parameter

from onebit.benchmarks import console, record
from onebit.comm import Backend, CompressedWork, make_backend
from onebit.comm.numbers import gather_numbers
from onebit.comm.order import Guard
from onebit.optim import OnebitAdam


@contextlib.contextmanager
def unchecked(device: torch.device) -> Iterator[None]:
    """A block in which nothing is checked."""
    finite = torch.ones((), dtype=torch.bool, device=device)

    def nothing(*arguments: object) -> None:
        """Find no fault."""

    with contextlib.ExitStack() as off:
        off.enter_context(mock.patch.object(CompressedWork, "all_finite", return_value=finite))
        for owner, names in (
            (Guard, ("__enter__", "__exit__")),
            (Backend, ("check",)),
        ):
            for name in names:
                off.enter_context(mock.patch.object(owner, name, nothing))
        off.enter_context(mock.patch("onebit.optim.base.refused", nothing))
        yield


def measure(backend: Backend, device: torch.device, numel: int, pairs: int, repeats: int) -> list[tuple[float, float]]:
    """Seconds of a step with and without checks, by pair, the slowest rank's."""
    dice = torch.Generator().manual_seed(1 + backend.rank)
    param = Parameter(torch.ones(numel, device=device))
    param.grad = torch.randn(numel, generator=dice).to(device)
    optimizer = OnebitAdam([param], lr=1e-4, freeze_step=1, backend=backend)
    for _ in range(4):
        optimizer.step()

    def seconds() -> float:
        backend.barrier()
        _finish(device)
        start = time.perf_counter()
        for _ in range(repeats):
            optimizer.step()
        _finish(device)
        return max(gather_numbers(backend, [(time.perf_counter() - start) / repeats]))[0]

    times = []
    for pair in range(pairs):
        found = {}
        for checks in (True, False) if pair % 2 else (False, True):
            with contextlib.nullcontext() if checks else unchecked(device):
                found[checks] = seconds()
        times.append((found[True], found[False]))
    return times


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(times: Sequence[tuple[float, float]], numel: int) -> dict[str, Any]:
    """The figures as they stand in a result; `ratio` is with checks over without, pair by pair."""
    checked, plain = np.array(times).T
    low, median, high = np.quantile(checked / plain, [0.25, 0.5, 0.75])
    return {
        "case": "compressed step",
        "numel": numel,
        "seconds": float(np.median(checked)),
        "seconds_unchecked": float(np.median(plain)),
        "ratio": {"median": float(median), "low": float(low), "high": float(high)},
        "wrong": None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print on rank 0, and return 0."""
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.guard_cost", description=__doc__.splitlines()[0])
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the parameters are")
    flags.add_argument("--numel", type=int, default=64 << 20, help="elements of the parameter")
    flags.add_argument("--pairs", type=int, default=15, help="pairs of measurements")
    flags.add_argument("--repeats", type=int, default=3, help="steps of one measurement")
    flags.add_argument("--output", type=Path, help="folder for the JSON result (none: no JSON)")
    options = flags.parse_args(arguments)
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if options.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        backend = make_backend("nccl" if device.type == "cuda" else "gloo")
        result = row(measure(backend, device, options.numel, options.pairs, options.repeats), options.numel)
        if backend.rank == 0:
            run = {"ranks": backend.size, "backend": backend.name, "link": "this machine", "pairs": options.pairs}
            document = record.make(f"guards-{backend.name}-{backend.size}", run, [result], options.device)
            ratio = result["ratio"]
            console.say(
                f"a compressed step of {options.numel} elements takes {result['seconds'] * 1e3:.2f} ms, "
                f"{ratio['median']:.4f} times what it takes without checks ({ratio['low']:.4f} to {ratio['high']:.4f})"
            )
            if options.output:
                console.say(f"JSON: {record.save(document, options.output)}")
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
