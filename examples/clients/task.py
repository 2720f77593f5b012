"""What the examples of this folder train: a small classifier of points, in the form that all clients take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from onebit.optim import CompressedOptimizer, check_replicas

FEATURES, CLASSES = 32, 8


class Points(Dataset[dict[str, Tensor]]):
    """Random points, labelled by a random network: 8,192 to train with, or 2,048 others."""

    def __init__(self, *, train: bool) -> None:
        draw = torch.Generator().manual_seed(1)
        first, second = (torch.randn(shape, generator=draw) for shape in ((FEATURES, 16), (16, CLASSES)))
        points = torch.randn(8_192 + 2_048, FEATURES, generator=draw)
        self.inputs = points[:8_192] if train else points[8_192:]
        self.labels = ((self.inputs @ first).relu() @ second).argmax(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """A multi-layer perceptron; every rank starts from the same random weights."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@torch.no_grad()
def report(model: nn.Module, optimizer: CompressedOptimizer) -> None:
    """Print, on rank 0, how well the model does, and what was sent; every rank must call it."""
    check_replicas(optimizer)
    points = Points(train=False)
    device = next(model.parameters()).device
    logits = model(points.inputs.to(device), points.labels.to(device))["logits"]
    right = (logits.argmax(1).cpu() == points.labels).double().mean()
    sent = optimizer.stats
    if optimizer.backend.rank == 0:
        print(
            f"held-out accuracy {right:.3f} after {optimizer.param_groups[0]['step']} steps on "
            f"{optimizer.backend.size} ranks, which hold the same parameters; the last step was {optimizer.phase()}; "
            f"{sent.wire_bytes / 1e6:.2f} MB sent, {sent.dense_bytes / 1e6:.2f} MB in fp32"
        )
