"""`python -m onebit.benchmarks.overlap`: training steps with exchanges during backward, and after it.

Without a GPU: two hosts, network namespaces of this machine, on a link of --rate; needs root and iproute2. Layers take
their time as a device's would, with the processors idle; with --host they compute, and Gloo's threads have to wait for
a processor. Under torchrun on GPUs: a GPT of 124 M parameters, beside DDP with torch's fused AdamW; with --gpus N the
same on N hosts of a GPU each, which are namespaces, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onebit.benchmarks import console, record
from onebit.benchmarks.group import join
from onebit.benchmarks.launch import RankError, launch
from onebit.benchmarks.namespaces import NetworkError, shaped_hosts
from onebit.benchmarks.net import rank_on
from onebit.benchmarks.row import Row
from onebit.benchmarks.turns import ratio, timed_in_turns
from onebit.comm.backend import Backend
from onebit.comm.numbers import gather_numbers
from onebit.optim import OnebitAdam

AFTER, DURING = "step, overlap=False", "step, overlap=True"
WARM_UP = 1_000_000  # steps: more than are made


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.overlap", description=__doc__)
    flags.add_argument("--rate", default="60mbit", help="speed of the link, as tc writes it; not under torchrun")
    flags.add_argument("--gpus", type=int, metavar="N", help="train a GPT on N hosts of one GPU each")
    flags.add_argument("--phase", choices=("compressed", "warmup"), default="compressed", help="which steps are timed")
    flags.add_argument(
        "--host",
        action="store_true",
        help="compute on the processors; else a layer takes --layer_ms and leaves them idle",
    )
    flags.add_argument(
        "--layer_ms", type=float, default=5.0, help="of a layer's backward; its forward takes half of it"
    )
    flags.add_argument("--width", type=int, default=512, help="of a layer; without a GPU")
    flags.add_argument("--layers", type=int, default=24, help="how many; without a GPU")
    flags.add_argument("--batch", type=int, default=128, help="rows per rank, or on GPUs sequences of 1024 tokens")
    flags.add_argument(
        "--bucket_mb", type=float, nargs="+", help="MiB of fp32 per bucket; default: the optimizer's own"
    )
    flags.add_argument("-n", "--iters", type=int, default=15, help="timed steps of each kind")
    flags.add_argument("--compile", action="store_true", help="on GPUs: torch.compile the model")
    flags.add_argument("--output", type=Path, default=record.default_folder(), help="folder for the JSON result")
    flags.add_argument("--backend", help=argparse.SUPPRESS)  # the two that `launch` gives to ranks
    flags.add_argument("--init_method", help=argparse.SUPPRESS)
    flags.add_argument("--interface", help=argparse.SUPPRESS)
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured, and all ranks' parameters are equal; 1: not so; 69: a tool is missing; 77: not allowed here."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    if options.backend == "gloo":
        return _rank(options)
    if "RANK" in os.environ:
        from onebit.benchmarks.overlap_gpu import run  # needs CUDA

        return run(options)
    try:
        with shaped_hosts(options.rate, options.gpus or 2) as hosts:
            backend = "nccl" if options.gpus else "gloo"
            launch([rank_on(host) for host in hosts], given, module="onebit.benchmarks.overlap", backend=backend)
    except (NetworkError, RankError) as error:
        console.say(f"{error}", stderr=True)
        return error.status if isinstance(error, NetworkError) else 1
    return 0


def _rank(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    backend = join("gloo", options.init_method)
    freeze = 1 if options.phase == "compressed" else WARM_UP
    sizes = options.bucket_mb or [None]
    sides = {AFTER: _Side(options, backend, freeze, overlap=False)}
    for size in sizes:
        name = DURING if size is None else f"{DURING}, bucket_mb={size:g}"
        sides[name] = _Side(options, backend, freeze, overlap=True, bucket_mb=size)
    steps: dict[str, Callable[[], object]] = {name: side.step for name, side in sides.items()}
    plain = sides[AFTER]
    steps["forward and backward"] = plain.compute
    for _ in range(3):  # the first of them agree, compile and allocate
        for side in sides.values():
            side.step()
    seconds = timed_in_turns(steps, backend, options.iters)
    parts = {"backward": plain.backward_seconds, "exchange and update": plain.step_seconds}
    medians = {name: _slowest(backend, statistics.median(times)) for name, times in parts.items()}
    same = len({tuple(row) for row in gather_numbers(backend, plain.sums())}) == 1
    equal = same and all(side.sums() == plain.sums() for side in sides.values())
    if backend.rank == 0:
        figures: dict[str, Any] = {
            "ranks": backend.size,
            "backend": "gloo",
            "link": f"2 namespaces, {options.rate}",
            "phase": options.phase,
            "iterations": options.iters,
            "compute": f"processors, {options.batch} rows" if options.host else f"idle, {options.layer_ms} ms a layer",
            "seconds": medians,
            "exchange over backward": medians["exchange and update"] / medians["backward"],
            "buckets": {name: list(side.optimizer.overlapped) for name, side in sides.items()},
            "time over overlap=False": {name: ratio(seconds[name], seconds[AFTER]) for name in sides if name != AFTER},
            "bit-equal": equal,
        }
        name = f"overlap-{options.phase}-{options.rate}" + ("-host" if options.host else "")
        save(name, figures, [row(name, plain.numel, times) for name, times in seconds.items()], options.output, "cpu")
    return 0 if equal else 1


class _Side:
    """A network of its own, trained in the same way as its twins."""

    def __init__(
        self, options: argparse.Namespace, backend: Backend, freeze: int, overlap: bool, bucket_mb: float | None = None
    ) -> None:
        width = options.width
        torch.manual_seed(0)
        self.model = nn.Sequential(*(_layer(options, backend.rank + i) for i in range(options.layers)))
        self.numel = sum(p.numel() for p in self.model.parameters())
        self.optimizer = OnebitAdam(
            self.model.parameters(), freeze_step=freeze, backend=backend, overlap=overlap, bucket_mb=bucket_mb
        )
        self.input: Tensor = torch.randn(
            options.batch, width, generator=torch.Generator().manual_seed(1 + backend.rank)
        )
        self.backward_seconds: list[float] = []
        self.step_seconds: list[float] = []

    def compute(self) -> None:
        with self.optimizer.no_sync():
            self.model(self.input).square().mean().backward()
        self.model.zero_grad()

    def step(self) -> None:
        loss = self.model(self.input).square().mean()
        start = time.perf_counter()
        loss.backward()
        ready = time.perf_counter()
        self.optimizer.step()
        self.backward_seconds.append(ready - start)
        self.step_seconds.append(time.perf_counter() - ready)
        self.optimizer.zero_grad()

    def sums(self) -> list[float]:
        """Fingerprints of the parameters: any bit that differs shows in them."""
        return [float(p.detach().view(torch.int32).long().sum()) for p in self.model.parameters()]


class _Pause(torch.autograd.Function):
    """A layer on a device: the host waits for it and does nothing, and its gradient is there when it ends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor, seconds: float) -> Tensor:
        ctx.gradient, ctx.seconds = gradient, seconds
        time.sleep(seconds / 2)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        time.sleep(ctx.seconds)
        return gradients[0], ctx.gradient.clone(), None, None


class _DeviceLayer(nn.Module):
    """As many parameters as a linear layer has, with a gradient of this rank's own that is the same in every step."""

    def __init__(self, width: int, seconds: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.ones(width, width))
        self.gradient = torch.randn(width, width, generator=generator)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        paused: Tensor = _Pause.apply(x, self.weight, self.gradient, self.seconds)  # type: ignore[no-untyped-call]
        return paused


def _layer(options: argparse.Namespace, seed: int) -> nn.Module:
    width = options.width
    if options.host:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU())
    return _DeviceLayer(width, options.layer_ms / 1e3, seed)


def row(case: str, numel: int, seconds: Sequence[float]) -> Row:
    """A row of steps on `numel` parameters."""
    median = statistics.median(seconds)
    return Row(
        case=case,
        dtype="float32",
        numel=numel,
        nbytes=4 * numel,
        seconds=tuple(seconds),
        algbw=4 * numel / median / 1e9,
        wire_bytes=None,
        wire_formula=0,
        wire_busbw=0.0,
        link_bytes=None,
        stages={},
        ratios={},
        wrong=None,
    )


def save(name: str, figures: dict[str, Any], rows: Sequence[Row], folder: Path, device: str) -> None:
    """Write the document of a run, and say what it found."""
    result = record.make(name, figures, [record.row_fields(row) for row in rows], device)
    path = record.save(result, folder)
    for found in rows:
        console.say(f"{found.case:45} {1e3 * found.time.median:9.2f} ms")
    for key in figures:
        if "over" in key or key in ("seconds", "buckets", "bit-equal"):
            console.say(f"{key}: {figures[key]}")
    console.say(f"{path}")


def _slowest(backend: Backend, seconds: float) -> float:
    return max(numbers[0] for numbers in gather_numbers(backend, [seconds]))


if __name__ == "__main__":
    sys.exit(main())
