"""`python -m onebit.benchmarks.gpu`: the CUDA kernels alone, and under torchrun the averages over NCCL.

Everything is compared with the CPU kernels on the same inputs, element for element, before a time is taken.
"""

from __future__ import annotations

import argparse
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
from onebit.benchmarks.gpu_timing import CODEC, against, differing, make_row, report, timed
from onebit.benchmarks.row import Row
from onebit.comm import Backend, CompressedAllreduce, run_threads

MI = 1 << 20
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
    options = flags.parse_args(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    rows: list[Row] = []
    figures: dict[str, dict[str, float]] = {}
    if ranks == 1:
        rows = kernels(options.mega * MI, device, options.iters)
    else:
        dist.init_process_group("nccl", device_id=device)
        if options.only in (None, "averages"):
            sizes = [size * MI for size in (1, 8, 64, options.mega)]
            rows += [row for size in sizes for row in averages(size, device, options.iters)]
        if options.only in (None, "buckets"):
            rows += buckets(options.mega * MI, device, options.iters)
        if options.only in (None, "host"):
            figures["host_us"] = host_microseconds(_input(MI, dist.get_rank()).to(device))
    wrong = sum(row.wrong or 0 for row in rows)
    if int(os.environ.get("RANK", "0")) == 0:
        report("cuda-kernels" if ranks == 1 else f"nccl-{ranks}", ranks, options.iters, rows, options.output, **figures)
        _show_host(figures.get("host_us", {}))
    sys.stdout.flush()
    os._exit(min(wrong, 1))  # NCCL's own clean-up waits for captured graphs


def kernels(numel: int, device: torch.device, rounds: int) -> list[Row]:
    """Copy, and the codec's kernels in fp32 and bf16."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(numel, generator=generator)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += _kernels_of(x.to(dtype), device, rounds)
    return rows


def _kernels_of(x_cpu: Tensor, device: torch.device, rounds: int) -> list[Row]:
    numel, dtype = x_cpu.numel(), x_cpu.dtype
    x, y = x_cpu.to(device), torch.empty_like(x_cpu, device=device)
    copied = 2 * numel * dtype.itemsize
    packed = CODEC.plan([numel])[0].payload_bytes
    rows = [make_row("copy", dtype, numel, copied, timed(lambda: y.copy_(x), rounds), int((x != y).sum()))]

    residual, residual_cpu = torch.zeros(numel, device=device), torch.zeros(numel)
    (layout,) = CODEC.plan([numel])
    payload = torch.zeros(packed, dtype=torch.uint8, device=device)
    wrong = 0
    for _ in range(2):  # the second time the residual is not zero
        CODEC.encode(x, residual, layout=layout, out=payload)
        payload_cpu = CODEC.encode(x_cpu, residual_cpu)
        wrong += differing(payload, payload_cpu) + differing(residual, residual_cpu)
    times = timed(lambda: CODEC.encode(x, residual, layout=layout, out=payload), rounds)
    rows.append(make_row("encode", dtype, numel, numel * (dtype.itemsize + 8) + packed, times, wrong))

    CODEC.decode(payload, y, layout=layout)
    expected = torch.empty_like(x_cpu)
    CODEC.decode(payload.cpu(), expected)
    wrong = differing(y, expected)
    times = timed(lambda: CODEC.decode(payload, y, layout=layout), rounds)
    rows.append(make_row("decode", dtype, numel, numel * dtype.itemsize + packed, times, wrong))
    if dtype == torch.float32:
        rows += [_reduce_encode(numel // n, n, device, rounds) for n in (2, 4, 8)]
    yardstick = rows[0]
    for row in rows:
        row.ratios.update(against("copy", row, yardstick))
    return rows


def _reduce_encode(numel: int, ranks: int, device: torch.device, rounds: int) -> Row:
    generator = torch.Generator().manual_seed(ranks)
    inputs = [CODEC.encode(torch.randn(numel, generator=generator)) for _ in range(ranks)]
    payloads_cpu = torch.stack(inputs)
    payloads, (layout,) = payloads_cpu.to(device), CODEC.plan([numel])
    residual, residual_cpu = torch.zeros(numel, device=device), torch.zeros(numel)
    out = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=device)

    def run() -> None:
        CODEC.reduce_encode(payloads, residual, layout=layout, out=out)

    run()
    wrong = differing(out, CODEC.reduce_encode(payloads_cpu, residual_cpu, numel=numel))
    wrong += differing(residual, residual_cpu)
    moved = 8 * numel + (ranks + 1) * layout.payload_bytes
    return make_row(f"reduce_encode of {ranks}", torch.float32, numel, moved, timed(run, rounds), wrong)


def averages(numel: int, device: torch.device, rounds: int) -> list[Row]:
    """The mean over ranks of one tensor: NCCL's own in fp32 and bf16, and ours of fp32 and bf16 tensors."""
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in _averages_of(numel, dtype, device, rounds)]
    for row in rows:
        for other in rows:
            if other.case.startswith("nccl") and row.case == other.case.replace("nccl", "compressed"):
                row.ratios.update(against(f"NCCL {other.dtype}", row, other, by_time=True))
    return rows


def buckets(numel: int, device: torch.device, rounds: int) -> list[Row]:
    """The mean over ranks of one large fp32 tensor, in buckets of several sizes, which are pipelined."""
    x = _input(numel, dist.get_rank()).to(device)
    rows = []
    for bucket_mb in BUCKETS_MB:
        average = CompressedAllreduce(x, bucket_mb=bucket_mb)
        wrong = _wrong_average(average, numel, torch.float32, device)
        counted = average.stats.wire_bytes // average.stats.calls
        for case, overlap in (("", False), (", started and waited for", True)):
            times = timed(partial(_average, average, x, overlap), rounds, 1)
            name = f"compressed, {len(average.parts)} of {bucket_mb} MiB{case}"
            rows.append(make_row(name, torch.float32, numel, 4 * numel, times, wrong, counted))
    return rows


def _average(average: CompressedAllreduce, x: Tensor, overlap: bool) -> None:
    average.start(x, overlap=overlap).wait()


def _show_host(times: Mapping[str, float]) -> None:
    rows = [{"1 Mi fp32": name, "host µs": f"{spent:.1f}"} for name, spent in times.items()]
    if rows:
        console.show_table("host time per call", list(rows[0]), rows)


def _averages_of(numel: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[Row]:
    ranks = dist.get_world_size()
    x = _input(numel, dist.get_rank()).to(device, dtype)
    average = CompressedAllreduce(x, bucket_mb=4 * numel / MI)
    wrong = _wrong_average(average, numel, dtype, device)
    formula = 2 * (ranks - 1) * numel * dtype.itemsize // ranks
    counted = average.stats.wire_bytes // average.stats.calls

    def plain() -> None:
        dist.all_reduce(x, op=dist.ReduceOp.AVG)

    def compressed() -> None:
        average(x)

    cases = [
        ("nccl", timed(plain, rounds, 1), None, formula),
        ("compressed", timed(compressed, rounds, 1), wrong, counted),
    ]
    if numel <= 8 * MI:
        cases.append(("nccl, graph", _replayed(plain, rounds), None, formula))
        cases.append(("compressed, graph", _replayed(compressed, rounds), None, counted))
    nbytes = numel * dtype.itemsize
    return [make_row(name, dtype, numel, nbytes, times, bad, wire) for name, times, bad, wire in cases]


def _wrong_average(average: CompressedAllreduce, numel: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements, of two averages in a row, that differ from those of ranks that are threads with CPU tensors."""
    for _ in range(2):
        mine = _input(numel, dist.get_rank()).to(device, dtype)
        average(mine)
    average.residual.reset()
    wrong = torch.tensor(differing(mine, _right_average(numel, dtype)), device=device)
    dist.all_reduce(wrong)
    return int(wrong)


@lru_cache(1)  # buckets of several sizes have one result
def _right_average(numel: int, dtype: torch.dtype) -> Tensor:
    """The second of two averages of ranks that are threads with CPU tensors."""

    def on_cpu(backend: Backend) -> Tensor | None:
        tensors = [_input(numel, backend.rank).to(dtype) for _ in range(2)]
        same = CompressedAllreduce(tensors[0], backend, bucket_mb=4 * numel / MI)
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
