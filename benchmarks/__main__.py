"""`python -m onebit.benchmarks`: one run of the driver, alone or as one rank of many."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from onebit.benchmarks import console, plot, record, view
from onebit.benchmarks.case import Setting
from onebit.benchmarks.driver import drive
from onebit.benchmarks.group import join
from onebit.benchmarks.link import Link
from onebit.benchmarks.options import Options, parse
from onebit.benchmarks.tables import select
from onebit.comm import run_threads
from onebit.comm.backend import Backend
from onebit.compress import num_threads


def measure(backend: Backend, options: Options) -> record.Document:
    """Run what `options` asks for on this rank; every rank returns the same times."""
    threads = num_threads()
    torch.set_num_threads(threads)
    device = torch.device(options.device)
    settings = [_setting(backend, options, nbytes, threads, device) for nbytes in options.sizes]
    groups = select(options.cases or ("kernels" if backend.size == 1 else "collectives",))
    groups = [[case for case in cases if case.runs_with(device.type, options.codec, options.local)] for cases in groups]
    runs = sum(map(len, groups)) * len(settings) * options.sweep.runs()
    link = Link(options.interface) if options.interface else None
    with console.progress_bar(runs, show=backend.rank == 0) as progress:
        rows = [row for cases in groups for row in drive(cases, settings, options.sweep, progress=progress, link=link)]
    run = {
        "ranks": backend.size,
        "backend": backend.name,
        "link": options.link,
        "threads": threads,
        "codec": str(options.codec),
        "kernels": options.codec.kernels_on(device.type),
        "iterations": options.sweep.iterations,
        "warmup": options.sweep.warmup,
        "together": options.sweep.together,
        "graph": options.sweep.graph,
        "payloads": options.payloads,
        "bucket_mb": options.bucket_mb,
        "local": options.local,
        "seed": options.seed,
    }
    stripes = getattr(backend, "stripes", None)
    if stripes is not None and stripes.count is not None:
        run["stripes"] = stripes.count
    name = options.name or f"{backend.name}-{backend.size}"
    return record.make(name, run, [*map(record.row_fields, rows)], device.type)


def _setting(backend: Backend, options: Options, nbytes: int, threads: int, device: torch.device) -> Setting:
    return Setting(
        numel=max(1, nbytes // options.dtype.itemsize),
        backend=backend,
        dtype=options.dtype,
        device=device,
        threads=threads,
        codec=options.codec,
        payloads=options.payloads,
        bucket_mb=options.bucket_mb,
        local=options.local,
        seed=options.seed,
    )


def _show(result: record.Document, options: Options) -> None:
    rows = view.terminal(result)
    console.show_table(view.title(result), view.columns(rows), rows)
    if options.output:
        path = record.save(result, options.output)
        console.say(f"JSON: {path}")
        if options.plot:
            console.say(f"plot: {plot.draw(result, path.with_suffix('.png'))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured and right; 1: some element is wrong; 2: bad flags."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["plot"]:
        return plot.main(words[1:])
    options = parse(words)
    if options.backend == "threads":
        rank, result = 0, run_threads(options.ranks, measure, options)[0]
    else:
        backend = join(options.backend, options.init_method)
        rank, result = backend.rank, measure(backend, options)
        backend.barrier()
    if rank == 0:
        _show(result, options)
    return 1 if record.wrong(result) else 0


def leave(status: int) -> None:
    """End the process at once where torch.distributed runs.

    Gloo's threads now and then abort an interpreter that takes itself down ('terminate called without an active
    exception'), and a launcher would take that for a failed run. All results are written by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
