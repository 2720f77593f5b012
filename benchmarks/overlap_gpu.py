"""Training steps of a GPT of 124 M parameters on GPUs: 1-bit Adam by itself and in DDP, and DDP with fused AdamW.

Started by `torchrun --nproc-per-node 4 -m onebit.benchmarks.overlap` in a checkout, which has the model; or without
torchrun and with ``--gpus 4 --rate 10gbit``, for GPUs on hosts of their own.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from onebit.benchmarks.group import join, nccl_sockets
from onebit.benchmarks.overlap import AFTER, DURING, WARM_UP, row, save
from onebit.benchmarks.turns import ratio, timed_in_turns
from onebit.comm.ddp import attach
from onebit.comm.numbers import gather_numbers
from onebit.optim import OnebitAdam

DDP = "step, DDP and AdamW(fused=True)"
ATTACHED = "step, DDP and attach"
VOCABULARY, CONTEXT = 50304, 1024
EACH = 4  # steps of one measurement


def run(options: argparse.Namespace) -> int:
    """0: measured, and each model's parameters are equal on all ranks; 1: not so.

    Those of two models are not compared: attention's backward adds up in no fixed order on a GPU. A test compares steps
    with overlap and without, bit for bit, for gradients that are the same.
    """
    backend = join("nccl", options.init_method)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("high")
    batch = min(options.batch, 16)
    seeds = torch.Generator(device).manual_seed(1 + backend.rank)
    tokens = torch.randint(VOCABULARY, (batch, CONTEXT + 1), generator=seeds, device=device)
    freeze = 2 if options.phase == "compressed" else WARM_UP

    def ours(overlap: bool, bucket_mb: float | None = None) -> tuple[nn.Module, OnebitAdam]:
        model = _model(device)
        params = model.parameters()
        return model, OnebitAdam(
            params, lr=1e-4, freeze_step=freeze, backend=backend, overlap=overlap, bucket_mb=bucket_mb
        )

    made: dict[str, tuple[nn.Module, Any]] = {AFTER: ours(False)}
    for size in options.bucket_mb or [None]:
        made[DURING if size is None else f"{DURING}, bucket_mb={size:g}"] = ours(True, size)
    wrapped = DistributedDataParallel(_model(device), device_ids=[device.index], gradient_as_bucket_view=True)
    inner, attached = ours(False)
    made[ATTACHED] = (DistributedDataParallel(inner, device_ids=[device.index], gradient_as_bucket_view=True), attached)
    attach(made[ATTACHED][0], attached)
    made[DDP] = (wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-4, fused=True))
    compiled = {
        name: (torch.compile(model) if options.compile else model, optimizer)
        for name, (model, optimizer) in made.items()
    }
    steps = {name: _step(model, optimizer, tokens) for name, (model, optimizer) in compiled.items()}
    for _ in range(8):  # warm-up, and the first compressed steps, which compile and allocate
        for step in steps.values():
            step()
    seconds = timed_in_turns(steps, backend, options.iters, EACH)
    everywhere = gather_numbers(backend, [number for model, _ in made.values() for number in _sums(model)])
    equal = len({tuple(found) for found in everywhere}) == 1
    numel = sum(p.numel() for p in made[DDP][0].parameters())
    if backend.rank == 0:
        figures: dict[str, Any] = {
            "ranks": backend.size,
            "backend": "nccl",
            "link": _link(options),
            "phase": options.phase,
            "iterations": options.iters,
            "tokens per rank": batch * CONTEXT,
            "compiled": options.compile,
            "buckets": {
                name: list(optimizer.overlapped)
                for name, (_, optimizer) in made.items()
                if name.startswith((AFTER, DURING))
            },
            "time over DDP": {name: ratio(seconds[name], seconds[DDP]) for name in steps if name != DDP},
            "time over overlap=False": {name: ratio(seconds[name], seconds[AFTER]) for name in steps if name != AFTER},
            "replicas bit-equal": equal,
        }
        rows = [row(name, numel, times) for name, times in seconds.items()]
        way = f"-{options.rate}" if options.gpus else "-sockets" * nccl_sockets()
        save(f"overlap-{options.phase}-{backend.size}{way}", figures, rows, options.output, "cuda")
    torch.distributed.destroy_process_group()
    return 0 if equal else 1


def _link(options: argparse.Namespace) -> str:
    """How the result names what is between the ranks."""
    if options.gpus:
        return f"{options.gpus} namespaces, {options.rate}"
    return "TCP sockets" if nccl_sockets() else "the GPUs' own links"


def _model(device: torch.device) -> nn.Module:
    """The same start for every rank and every optimizer."""
    try:
        gpt = importlib.import_module("examples.gpt")
    except ModuleNotFoundError as error:
        raise SystemExit("the model is examples/gpt.py: start this in a checkout's root") from error
    torch.manual_seed(0)
    size = gpt.Size(vocabulary=VOCABULARY, width=768, layers=12, heads=12, context=CONTEXT)
    model: nn.Module = gpt.Gpt(size).to(device)
    return model


def _step(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, tokens: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sums(model: nn.Module) -> list[float]:
    """Fingerprints of the parameters: any bit that differs shows in them."""
    return [float(p.detach().view(torch.int32).long().sum()) for p in model.parameters()]
