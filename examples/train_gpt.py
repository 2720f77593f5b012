"""Train a small transformer on Python's own sources, with plain AdamW or with OnebitAdam, over any number of ranks.

    python examples/train_gpt.py                                        # alone
    torchrun --nproc-per-node 2 examples/train_gpt.py                   # NCCL where there are GPUs, else Gloo
    mpiexec -n 2 python examples/train_gpt.py --backend mpi             # MPI

Everything about onebit is in `join`, `make_optimizer` and `train`; the rest is a training script like any other.
Needs tqdm beside onebit, and mpi4py for ``--backend mpi``.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import Gpt, Size
from ranks import checksums, mean_over_ranks
from record import Record, environment
from text import VOCABULARY, load, sample, windows
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from onebit.comm import DenseAllreduce, broadcast, make_backend
from onebit.comm.backend import Backend
from onebit.compress import num_threads
from onebit.optim import OnebitAdam

BETAS = (0.9, 0.95)  # a variance that is frozen after some hundred steps should have forgotten the first ones by then
HELD_OUT_WINDOWS = 512


def main() -> None:
    options = parse()
    backend, device = join(options.backend)
    record = train(options, backend, device)
    if backend.rank == 0:
        print(f"held-out loss {record.held_out_loss:.4f} nats per byte; ranks agree: {record.ranks_agree}")
        if options.output is not None:
            record.write(options.output)
    backend.barrier()  # nobody leaves, and takes the others down, before the record is written
    if dist.is_initialized():
        dist.destroy_process_group()


def join(name: str | None) -> tuple[Backend, torch.device]:
    """Meet the other ranks that torchrun or mpiexec started, and choose this rank's device and number of threads."""
    if name != "mpi" and int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1"))) > 1:
        raise SystemExit("started by mpiexec: add --backend mpi")
    on_gpu = name in (None, "nccl") and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if name != "mpi" and "RANK" in os.environ:
        dist.init_process_group(name or ("nccl" if on_gpu else "gloo"))
    torch.set_num_threads(num_threads())
    return make_backend(name, device=device), device


def make_model(options: argparse.Namespace) -> Gpt:
    """A model with the same random weights wherever the seed is the same."""
    torch.manual_seed(options.seed)
    return Gpt(
        Size(
            vocabulary=VOCABULARY,
            width=options.width,
            layers=options.layers,
            heads=options.heads,
            context=options.context,
        )
    )


def make_optimizer(options: argparse.Namespace, parameters: list[nn.Parameter], backend: Backend) -> Optimizer:
    """AdamW, which leaves the averaging of gradients to the loop, or OnebitAdam, which sees to it itself."""
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=options.lr, betas=BETAS)
    return OnebitAdam(parameters, lr=options.lr, betas=BETAS, freeze_step=options.freeze_step, backend=backend)


def train(options: argparse.Namespace, backend: Backend, device: torch.device) -> Record:
    """Train from scratch; returns the record of the run, the same on every rank but for the times."""
    model = make_model(options).to(device)
    parameters = list(model.parameters())
    broadcast(model, backend)  # all ranks start from rank 0's model
    optimizer = make_optimizer(options, parameters, backend)
    average = DenseAllreduce(parameters, backend) if options.optimizer == "adamw" else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options))

    text, held_out = load()
    draw = torch.Generator().manual_seed(1_000_003 * options.seed + backend.rank)  # every rank reads other windows
    record = Record(vars(options), environment(device, backend), sum(p.numel() for p in parameters))
    with progress_bar(options.steps, backend) as bar:
        for _ in bar:
            started, sent, phase = clock(device), backend.traffic.wire_bytes, phase_of(optimizer)
            inputs, targets = sample(text, options.batch, options.context, draw)
            optimizer.zero_grad()
            loss = next_byte_loss(model, inputs.to(device), targets.to(device))
            loss.backward()
            computed = clock(device)
            if average is not None:
                average([p.grad for p in parameters if p.grad is not None])
            optimizer.step()
            schedule.step()
            finished = clock(device)
            record.add(
                loss=loss.item(),
                phase=phase,
                wire_bytes=backend.traffic.wire_bytes - sent,
                seconds=finished - started,
                update_seconds=finished - computed,
            )
            sent_mb = sum(record.wire_bytes) / 1e6
            bar.set_postfix_str(f"loss {record.loss[-1]:.3f}, {phase}, {sent_mb:.1f} MB sent", refresh=False)

    record.loss = mean_over_ranks(record.loss, backend, device)
    record.held_out_loss = held_out_loss(model, held_out, options, backend, device)
    record.checksums = checksums(parameters, backend)
    return record


def phase_of(optimizer: Optimizer) -> str:
    """What the next step will send: fp32 gradients ("dense", "warmup") or momentum in one bit per number."""
    return optimizer.phase() if isinstance(optimizer, OnebitAdam) else "dense"


def learning_rate_factor(step: int, options: argparse.Namespace) -> float:
    """A linear warm-up that ends well before the variance is frozen, then a cosine down to a tenth."""
    warmup = max(1, options.freeze_step // 2)
    progress = max(0, step - warmup) / max(1, options.steps - warmup)
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))


def next_byte_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(
    model: nn.Module, text: Tensor, options: argparse.Namespace, backend: Backend, device: torch.device
) -> float:
    """The loss on windows spread over the held-out files, which the ranks share out among themselves."""
    inputs, targets = windows(text, HELD_OUT_WINDOWS, options.context, backend.rank, backend.size)
    total = 0.0
    for some, wanted in zip(inputs.split(options.batch), targets.split(options.batch), strict=True):
        total += next_byte_loss(model, some.to(device), wanted.to(device)).item() * len(some)
    return mean_over_ranks([total * backend.size / HELD_OUT_WINDOWS], backend, device)[0]


def clock(device: torch.device) -> float:
    """Seconds, once all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def progress_bar(steps: int, backend: Backend) -> tqdm[int]:
    """A bar on rank 0 only; in a log file it says something every ten seconds."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(range(steps), unit="step", disable=backend.rank != 0, mininterval=interval, dynamic_ncols=True)


def parse() -> argparse.Namespace:
    """The command line; the freeze, unless given, comes after a quarter of the steps."""
    parser = argparse.ArgumentParser(description="Train a small transformer on Python's own sources.")
    parser.add_argument("--optimizer", choices=("adamw", "onebit-adam"), default="onebit-adam")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--freeze-step", type=int, help="last step of OnebitAdam's warm-up (default: steps / 4)")
    parser.add_argument("--backend", choices=("gloo", "nccl", "mpi"), help="default: nccl on a GPU, else gloo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=8, help="windows per rank and step")
    parser.add_argument("--context", type=int, default=128, help="bytes per window")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write the run's record to this JSON file")
    options = parser.parse_args()
    if options.freeze_step is None:
        options.freeze_step = max(1, options.steps // 4)
    return options


if __name__ == "__main__":
    main()
