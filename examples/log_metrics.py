"""Train a small model on every rank and plot in TensorBoard what its optimizer tells of itself.

torchrun --nproc-per-node 2 examples/log_metrics.py
tensorboard --logdir out/tensorboard
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from onebit.optim import CompressedOptimizer, OnebitAdam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/tensorboard"))
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    writer = SummaryWriter(options.folder / f"rank-{rank}")  # every rank has error feedback of its own

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
    optimizer = OnebitAdam(model.parameters(), lr=1e-3, freeze_step=options.steps // 5)
    torch.manual_seed(1 + rank)
    for step in range(1, options.steps + 1):
        inputs = torch.randn(32, 64)
        loss = torch.nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            writer.add_scalar("loss", loss.item(), step)
            plot(writer, optimizer, step)
    writer.close()
    dist.destroy_process_group()


def plot(writer: SummaryWriter, optimizer: CompressedOptimizer, step: int) -> None:
    """One curve per number, and the phases as text."""
    for name, value in optimizer.metrics(compression_error=True).items():
        if isinstance(value, str):
            writer.add_text(f"onebit/{name}", value, step)
        else:
            writer.add_scalar(f"onebit/{name}", value, step)


if __name__ == "__main__":
    main()
