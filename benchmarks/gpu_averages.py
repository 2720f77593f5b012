"""Averages over NCCL beside NCCL's own; bits are compared with those of ranks that are threads with CPU tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from onebit.benchmarks.case import Setting
from onebit.benchmarks.collectives import two_level_wire
from onebit.benchmarks.gpu_timing import MI, against, captured, differing, make_row, timed
from onebit.benchmarks.row import Row
from onebit.comm import Backend, CompressedAllreduce, make_backend, run_threads
from onebit.comm.torch_backend import TorchBackend
from onebit.compress import Codec

DTYPES = (torch.float32, torch.bfloat16)
BUCKETS_MB = (128, 256, 512, 2048)
OURS, NCCL, GRAPH = "compressed", "nccl", ", graph"


@dataclass(frozen=True)
class Way:
    """A way to average.

    Attributes:
        codec: what is sent.
        name: what names of rows say of it.
        local: neighbouring ranks of a node; 1: all ranks on one level.
        alone: NCCL carries all of it, and nothing goes through memory that GPUs of one machine can all write to.
    """

    codec: Codec
    name: str = ""
    local: int = 1
    alone: bool = False

    def __str__(self) -> str:
        nodes = f", nodes of {self.local}" if self.local > 1 else ""
        return OURS + self.name + nodes + ", by NCCL alone" * self.alone

    def average(self, like: Tensor, backend: Backend, bucket_mb: float | None = None) -> CompressedAllreduce:
        """The average of such tensors, in one bucket unless told otherwise."""
        bucket_mb = bucket_mb or 4 * like.numel() / MI
        local_group = self.local if self.local > 1 else None
        if self.alone and isinstance(backend, TorchBackend):
            backend = _nccl_alone()
        return CompressedAllreduce(like, backend, codec=self.codec, bucket_mb=bucket_mb, local_group=local_group)

    def wire_bytes(self, numel: int, backend: Backend) -> int:
        """What one rank must send, on two levels what it must send to other nodes."""
        return round(two_level_wire(Setting(numel=numel, backend=backend, codec=self.codec, local=self.local)))


def averages(numel: int, backend: Backend, device: torch.device, rounds: int, ways: Sequence[Way]) -> list[Row]:
    """The mean over ranks of one tensor, fp32 and bf16: NCCL's own, and ours in one bucket."""
    return [row for dtype in DTYPES for row in _averages_of(numel, dtype, backend, device, rounds, ways)]


def _averages_of(
    numel: int, dtype: torch.dtype, backend: Backend, device: torch.device, rounds: int, ways: Sequence[Way]
) -> list[Row]:
    nbytes = numel * dtype.itemsize
    x = normal(numel, backend.rank).to(device, dtype, copy=True)

    def rows_of(
        name: str, run: Callable[[], object], formula: int, wrong: int | None, counted: int | None
    ) -> list[Row]:
        rows = [make_row(name, dtype, numel, nbytes, timed(run, rounds, 1), wrong, formula, counted)]
        if numel <= 8 * MI:
            replayed = timed(captured(run).replay, rounds, 1)
            rows.append(make_row(name + GRAPH, dtype, numel, nbytes, replayed, wrong, formula, counted))
        return rows

    formula = 2 * (backend.size - 1) * nbytes // backend.size
    rows = rows_of(NCCL, lambda: dist.all_reduce(x, op=dist.ReduceOp.AVG), formula, None, None)
    for way in ways:
        average = way.average(x, backend)
        wrong, counted = _checked(average, way, numel, dtype, device)
        rows += rows_of(str(way), partial(average, x), way.wire_bytes(numel, backend), wrong, counted)
    return rows


def buckets(numel: int, backend: Backend, device: torch.device, rounds: int, ways: Sequence[Way]) -> list[Row]:
    """The mean over ranks of one large fp32 tensor, in buckets of several sizes, which are pipelined."""
    x = normal(numel, backend.rank).to(device, copy=True)
    rows = []
    for way, bucket_mb in itertools.product(ways, BUCKETS_MB):
        average = way.average(x, backend, bucket_mb)
        wrong, counted = _checked(average, way, numel, x.dtype, device)
        formula = way.wire_bytes(numel, backend)
        for case, overlap in (("", False), (", started and waited for", True)):
            times = timed(partial(_average, average, x, overlap), rounds, 1)
            name = f"{way}, {len(average.parts)} of {bucket_mb} MiB{case}"
            rows.append(make_row(name, x.dtype, numel, 4 * numel, times, wrong, formula, counted))
    return rows


def compare(rows: Sequence[Row]) -> None:
    """Give ours the ratios of their times to those of NCCL's averages of as many elements, of either dtype."""
    for row, other in itertools.product(rows, rows):
        alike = row.numel == other.numel and row.case.endswith(GRAPH) == other.case.endswith(GRAPH)
        if alike and row.case.startswith(OURS) and other.case.startswith(NCCL):
            row.ratios.update(against(f"NCCL {other.dtype}", row, other, by_time=True))


def _average(average: CompressedAllreduce, x: Tensor, overlap: bool) -> None:
    average.start(x, overlap=overlap).wait()


def _checked(
    average: CompressedAllreduce, way: Way, numel: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """Elements, of two averages in a row, that differ from what is right, over all ranks; bytes as of `wire_bytes`."""
    backend = average.backend
    for _ in range(2):
        mine = normal(numel, backend.rank).to(device, dtype, copy=True)
        average(mine)
    average.residual.reset()
    wrong = torch.tensor(differing(mine, _right_average(way, numel, dtype, backend.size, backend.rank)), device=device)
    dist.all_reduce(wrong)
    stats = average.stats
    return int(wrong), (stats.wire_bytes - stats.local_bytes) // stats.calls


@lru_cache(1)
def _nccl_alone() -> Backend:
    """All ranks, over NCCL and nothing else; collective when it is first called."""
    made = make_backend(dist.new_group())
    assert isinstance(made, TorchBackend)
    assert made.peers is not None
    made.peers.refusal = "NCCL alone is timed"
    return made


@lru_cache(1)  # buckets of several sizes have one result
def _right_average(way: Way, numel: int, dtype: torch.dtype, ranks: int, rank: int) -> Tensor:
    """The second of two averages of ranks that are threads with CPU tensors, as `rank` has it."""

    def on_cpu(backend: Backend) -> Tensor | None:
        x = normal(numel, backend.rank)
        same = way.average(x.to(dtype), backend)
        for _ in range(2):
            tensor = x.to(dtype, copy=True)
            same(tensor)
        return tensor if backend.rank == rank else None

    right = run_threads(ranks, on_cpu, timeout=300.0)[rank]
    assert right is not None
    return right


@lru_cache(8)  # what the ranks of one machine have, of one size
def normal(numel: int, rank: int) -> Tensor:
    """The (numel,) standard normal fp32 numbers of a rank, on the CPU; not to be changed."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank))
