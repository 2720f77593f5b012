"""`python -m onebit.benchmarks.gpu`: the CUDA kernels alone, and under torchrun the averages over NCCL.

Everything is compared with the CPU kernels on the same inputs, element for element, before a time is taken.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from onebit.benchmarks import console, record
from onebit.benchmarks.gpu_host import host_microseconds
from onebit.benchmarks.gpu_timing import against, differing, make_row, report, timed
from onebit.benchmarks.options import parse_codec
from onebit.benchmarks.row import Row
from onebit.comm import Backend, CompressedAllreduce, run_threads
from onebit.compress import Codec

MI = 1 << 20
Codecs = Mapping[str, Codec]  # by what names of rows say of them
BUCKETS_MB = (128, 256, 512, 2048)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: everything was right; 1: something was wrong."""
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.gpu", description=__doc__)
    flags.add_argument("--output", type=Path, default=record.default_folder(), help="folder for the JSON results")
    flags.add_argument("--mega", type=int, default=300, help="Mi elements of the largest tensor")
    flags.add_argument("-n", "--iters", type=int, default=15, help="timed rounds")
    flags.add_argument(
        "--only",
        choices=["averages", "buckets", "host"],
        help="one of what is measured under torchrun: times of averages "
        "of several sizes, the largest in buckets of several sizes, host time of a small one",
    )
    flags.add_argument(
        "--codecs",
        nargs="+",
        type=_named_codec,
        default=[_named_codec("sign")],
        help="codecs to be timed, such as sign int8 int8:error_feedback=false int4:rotate=true",
    )
    options = flags.parse_args(arguments)
    codecs: Codecs = dict(options.codecs)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    rows: list[Row] = []
    figures: dict[str, dict[str, float]] = {}
    if ranks == 1:
        rows = kernels(options.mega * MI, device, options.iters, codecs)
    else:
        dist.init_process_group("nccl", device_id=device)
        if options.only in (None, "averages"):
            sizes = [size * MI for size in (1, 8, 64, options.mega)]
            rows += [row for size in sizes for row in averages(size, device, options.iters, codecs)]
        if options.only in (None, "buckets"):
            rows += buckets(options.mega * MI, device, options.iters, codecs)
        if options.only in (None, "host"):
            figures["host_us"] = host_microseconds(_input(MI, dist.get_rank()).to(device))
    wrong = sum(row.wrong or 0 for row in rows)
    if int(os.environ.get("RANK", "0")) == 0:
        report("cuda-kernels" if ranks == 1 else f"nccl-{ranks}", ranks, options.iters, rows, options.output, **figures)
        _show_host(figures.get("host_us", {}))
    sys.stdout.flush()
    os._exit(min(wrong, 1))  # NCCL's own clean-up waits for captured graphs


def _named_codec(text: str) -> tuple[str, Codec]:
    """What rows say of a codec, nothing of the default one, and the codec."""
    try:
        return "" if text == "sign" else f" {text}", parse_codec(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def kernels(numel: int, device: torch.device, rounds: int, codecs: Codecs) -> list[Row]:
    """Copy, and the codecs' kernels in fp32 and bf16."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(numel, generator=generator)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += _kernels_of(x.to(dtype), device, rounds, codecs)
    return rows


def _kernels_of(x_cpu: Tensor, device: torch.device, rounds: int, codecs: Codecs) -> list[Row]:
    numel, dtype = x_cpu.numel(), x_cpu.dtype
    x, y = x_cpu.to(device), torch.empty_like(x_cpu, device=device)
    copied = 2 * numel * dtype.itemsize
    yardstick = make_row("copy", dtype, numel, copied, timed(lambda: y.copy_(x), rounds), int((x != y).sum()))
    rows = [yardstick]
    for name, codec in codecs.items():
        rows += _encode_and_decode(name, codec, x_cpu, x, y, rounds)
        if dtype == torch.float32:
            rows += [_reduce_encode(name, codec, numel // n, n, device, rounds) for n in (2, 4, 8)]
    for row in rows:
        row.ratios.update(against("copy", row, yardstick))
    return rows


def _encode_and_decode(name: str, codec: Codec, x_cpu: Tensor, x: Tensor, y: Tensor, rounds: int) -> list[Row]:
    """Of the same tensor on the CPU and on the device; `y` is written to."""
    numel, dtype = x.numel(), x.dtype
    (layout,) = codec.plan([numel])
    residual, residual_cpu = _residual(codec, numel, x.device), _residual(codec, numel, x_cpu.device)
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=x.device)
    wrong = 0
    for _ in range(2):  # the second time the residual is not zero
        codec.encode(x, residual, layout=layout, out=payload)
        payload_cpu = codec.encode(x_cpu, residual_cpu)
        wrong += differing(payload, payload_cpu) + _differing_residuals(residual, residual_cpu)
    times = timed(lambda: codec.encode(x, residual, layout=layout, out=payload), rounds)
    moved = numel * (dtype.itemsize + 8 * codec.error_feedback) + layout.payload_bytes
    encoded = make_row(f"encode{name}", dtype, numel, moved, times, wrong)

    codec.decode(payload, y, layout=layout)
    expected = torch.empty_like(x_cpu)
    codec.decode(payload.cpu(), expected)
    wrong = differing(y, expected)
    times = timed(lambda: codec.decode(payload, y, layout=layout), rounds)
    moved = numel * dtype.itemsize + layout.payload_bytes
    return [encoded, make_row(f"decode{name}", dtype, numel, moved, times, wrong)]


def _reduce_encode(name: str, codec: Codec, numel: int, ranks: int, device: torch.device, rounds: int) -> Row:
    generator = torch.Generator().manual_seed(ranks)
    inputs = [codec.encode(torch.randn(numel, generator=generator)) for _ in range(ranks)]
    payloads_cpu = torch.stack(inputs)
    payloads, (layout,) = payloads_cpu.to(device), codec.plan([numel])
    residual, residual_cpu = _residual(codec, numel, device), _residual(codec, numel, payloads_cpu.device)
    out = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=device)

    def run() -> None:
        codec.reduce_encode(payloads, residual, layout=layout, out=out)

    run()
    wrong = differing(out, codec.reduce_encode(payloads_cpu, residual_cpu, numel=numel))
    wrong += _differing_residuals(residual, residual_cpu)
    moved = 8 * numel * codec.error_feedback + (ranks + 1) * layout.payload_bytes
    return make_row(f"reduce_encode{name} of {ranks}", torch.float32, numel, moved, timed(run, rounds), wrong)


def _residual(codec: Codec, numel: int, device: torch.device) -> Tensor | None:
    return torch.zeros(numel, device=device) if codec.error_feedback else None


def _differing_residuals(a: Tensor | None, b: Tensor | None) -> int:
    return 0 if a is None or b is None else differing(a, b)


def averages(numel: int, device: torch.device, rounds: int, codecs: Codecs) -> list[Row]:
    """The mean over ranks of one tensor: NCCL's own in fp32 and bf16, and ours of fp32 and bf16 tensors."""
    dtypes = (torch.float32, torch.bfloat16)
    rows = [row for dtype in dtypes for row in _averages_of(numel, dtype, device, rounds, codecs)]
    for row, other in itertools.product(rows, rows):
        replayed = [r.case.endswith("graph") for r in (row, other)]
        if row.case.startswith("compressed") and other.case.startswith("nccl") and replayed[0] == replayed[1]:
            row.ratios.update(against(f"NCCL {other.dtype}", row, other, by_time=True))
    return rows


def buckets(numel: int, device: torch.device, rounds: int, codecs: Codecs) -> list[Row]:
    """The mean over ranks of one large fp32 tensor, in buckets of several sizes, which are pipelined."""
    x = _input(numel, dist.get_rank()).to(device)
    rows = []
    for (name, codec), bucket_mb in itertools.product(codecs.items(), BUCKETS_MB):
        average = CompressedAllreduce(x, codec=codec, bucket_mb=bucket_mb)
        wrong = _wrong_average(average, codec, numel, torch.float32, device)
        counted = average.stats.wire_bytes // average.stats.calls
        for case, overlap in (("", False), (", started and waited for", True)):
            times = timed(partial(_average, average, x, overlap), rounds, 1)
            told = f"compressed{name}, {len(average.parts)} of {bucket_mb} MiB{case}"
            rows.append(make_row(told, torch.float32, numel, 4 * numel, times, wrong, counted))
    return rows


def _average(average: CompressedAllreduce, x: Tensor, overlap: bool) -> None:
    average.start(x, overlap=overlap).wait()


def _show_host(times: Mapping[str, float]) -> None:
    rows = [{"1 Mi fp32": name, "host µs": f"{spent:.1f}"} for name, spent in times.items()]
    if rows:
        console.show_table("host time per call", list(rows[0]), rows)


def _averages_of(numel: int, dtype: torch.dtype, device: torch.device, rounds: int, codecs: Codecs) -> list[Row]:
    ranks, nbytes = dist.get_world_size(), numel * dtype.itemsize
    x = _input(numel, dist.get_rank()).to(device, dtype)
    formula = 2 * (ranks - 1) * nbytes // ranks

    def rows_of(name: str, run: Callable[[], object], wrong: int | None, wire: int) -> list[Row]:
        rows = [make_row(name, dtype, numel, nbytes, timed(run, rounds, 1), wrong, wire)]
        if numel <= 8 * MI:
            rows.append(make_row(f"{name}, graph", dtype, numel, nbytes, _replayed(run, rounds), wrong, wire))
        return rows

    rows = rows_of("nccl", lambda: dist.all_reduce(x, op=dist.ReduceOp.AVG), None, formula)
    for name, codec in codecs.items():
        average = CompressedAllreduce(x, codec=codec, bucket_mb=4 * numel / MI)
        wrong = _wrong_average(average, codec, numel, dtype, device)
        counted = average.stats.wire_bytes // average.stats.calls
        rows += rows_of(f"compressed{name}", partial(average, x), wrong, counted)
    return rows


def _wrong_average(
    average: CompressedAllreduce, codec: Codec, numel: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Elements, of two averages in a row, that differ from those of ranks that are threads with CPU tensors."""
    for _ in range(2):
        mine = _input(numel, dist.get_rank()).to(device, dtype)
        average(mine)
    average.residual.reset()
    wrong = torch.tensor(differing(mine, _right_average(codec, numel, dtype)), device=device)
    dist.all_reduce(wrong)
    return int(wrong)


@lru_cache(1)  # buckets of several sizes have one result
def _right_average(codec: Codec, numel: int, dtype: torch.dtype) -> Tensor:
    """The second of two averages of ranks that are threads with CPU tensors."""

    def on_cpu(backend: Backend) -> Tensor | None:
        tensors = [_input(numel, backend.rank).to(dtype) for _ in range(2)]
        same = CompressedAllreduce(tensors[0], backend, codec=codec, bucket_mb=4 * numel / MI)
        for tensor in tensors:
            same(tensor)
        return tensors[1] if backend.rank == dist.get_rank() else None

    right = run_threads(dist.get_world_size(), on_cpu, timeout=300.0)[dist.get_rank()]
    assert right is not None
    return right


def _input(numel: int, rank: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank))


def _replayed(run: Callable[[], object], rounds: int) -> list[float]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timed(graph.replay, rounds, 1)


if __name__ == "__main__":
    sys.exit(main())
