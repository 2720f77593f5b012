"""`python -m onebit.benchmarks.gpu`: the CUDA kernels alone, and under torchrun the averages over NCCL.

Everything is compared with the CPU kernels on the same inputs, element for element, before a time is taken.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from onebit.benchmarks import console
from onebit.benchmarks.gpu_averages import Way, averages, buckets, compare, normal
from onebit.benchmarks.gpu_host import host_microseconds
from onebit.benchmarks.gpu_kernels import kernels
from onebit.benchmarks.gpu_run import Place, flags_of, leave, report
from onebit.benchmarks.gpu_timing import MI
from onebit.benchmarks.options import parse_codec
from onebit.benchmarks.row import Row
from onebit.comm import make_backend
from onebit.compress import Codec

SIZES = (1, 8, 64)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Ends the process: 0: everything was right; 1: something was wrong."""
    options = _flags().parse_args(arguments)
    place = Place.taken()
    rows: list[Row] = []
    figures: dict[str, dict[str, float]] = {}
    if place.ranks == 1:
        rows = kernels(options.mega * MI, place.device, options.iters, dict(options.codecs))
    else:
        rows, figures = _over_nccl(options, place.device)
    if place.rank == 0:
        name = options.name or ("cuda-kernels" if place.ranks == 1 else f"nccl-{place.ranks}")
        report(name, place.ranks, options.iters, rows, options.output, **figures)
        _show_host(figures.get("host_us", {}))
    leave(rows)


def _flags() -> argparse.ArgumentParser:
    flags = flags_of("gpu", __doc__)
    flags.add_argument("--name", help="name of the result (cuda-kernels; nccl-4 for 4 ranks)")
    flags.add_argument(
        *("--sizes", "-s"), type=int, nargs="*", default=SIZES, help="Mi elements of smaller ones that are averaged"
    )
    flags.add_argument(
        "--only",
        nargs="+",
        choices=["averages", "buckets", "host"],
        default=["averages", "buckets", "host"],
        help="of what is measured under torchrun: times of averages of several sizes, the largest in buckets of "
        "several sizes, host time of a small one",
    )
    flags.add_argument(
        "--codecs",
        nargs="+",
        type=_named_codec,
        default=[_named_codec("sign")],
        help="codecs to be timed, such as sign int8 int8:error_feedback=false int4:rotate=true",
    )
    flags.add_argument(
        "--per-node", type=int, default=1, help="averages are timed on two levels, too, of nodes of so many ranks"
    )
    flags.add_argument(
        "--by-nccl", action="store_true", help="averages on one level are timed with NCCL's own collectives, too"
    )
    return flags


def _named_codec(text: str) -> tuple[str, Codec]:
    """What rows say of a codec, nothing of the default one, and the codec."""
    try:
        return "" if text == "sign" else f" {text}", parse_codec(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _over_nccl(options: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Rows of averages, and what the host takes for a small one."""
    dist.init_process_group("nccl", device_id=device)
    backend, largest = make_backend("nccl"), options.mega * MI
    nodes = sorted({1, options.per_node} - {backend.size})
    ways = [Way(codec, name, local) for (name, codec), local in itertools.product(options.codecs, nodes)]
    if options.by_nccl:  # on one level: groups of the ranks of a node would find out for themselves what they may use
        ways += [Way(codec, name, alone=True) for name, codec in options.codecs]
    rows, figures = [], {}
    if "averages" in options.only:
        sizes = [*(size * MI for size in options.sizes), largest]
        rows += [row for size in sizes for row in averages(size, backend, device, options.iters, ways)]
    if "buckets" in options.only:
        rows += buckets(largest, backend, device, options.iters, ways)
    if "host" in options.only:
        figures["host_us"] = host_microseconds(normal(MI, backend.rank).to(device))
    compare(rows)
    return rows, figures


def _show_host(times: Mapping[str, float]) -> None:
    rows = [{"1 Mi fp32": name, "host µs": f"{spent:.1f}"} for name, spent in times.items()]
    if rows:
        console.show_table("host time per call", list(rows[0]), rows)


if __name__ == "__main__":
    main()
