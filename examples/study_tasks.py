"""What the convergence study trains: handwritten digits, and the next byte of Python's sources."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from gpt import Gpt, Size
from study_plan import Run
from text import VOCABULARY, load, sample, standard_library, windows
from torch import Tensor, nn

DIGITS = Path("out/digits.npz")  # what `study.py digits` writes, for machines without scikit-learn
# Standard deviation of what is added to pixels within ±1. Without it the loss goes to nearly 0, where a percent of it
# is chance, and gradients go to nearly 0 with it, which a frozen variance cannot follow.
NOISE = 1.0
COPIES = 4  # of each held-out image, each with other noise


class Task(ABC):
    """A model, training samples drawn at random, and held-out samples."""

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A model with random weights from torch's global generator."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step for all ranks together."""

    @abstractmethod
    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of inputs and targets that training never sees, the same for every run."""

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(model(inputs).flatten(0, -2).float(), targets.flatten())


class Digits(Task):
    """scikit-learn's 1797 images of 8 x 8 pixels under noise; every fifth is held out."""

    def __init__(self, run: Run) -> None:
        self._run = run
        images, labels = load_digits()
        images = images.float() / 8 - 1
        held_out = torch.arange(len(labels)) % 5 == 0
        self._train = images[~held_out], labels[~held_out]
        self._held_out = images[held_out], labels[held_out]

    def make_model(self) -> nn.Module:
        widths = [64, *[self._run.width] * self._run.layers]
        hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.LayerNorm(b), nn.GELU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], 10))

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, labels = self._train
        chosen = torch.randint(len(labels), (self._run.batch,), generator=generator)
        return _noisy(images[chosen], generator), labels[chosen]

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        images, labels = (part.repeat_interleave(COPIES, 0) for part in self._held_out)
        noisy = _noisy(images, torch.Generator().manual_seed(0))
        parts = self._run.held_out_batches
        return list(zip(noisy.chunk(parts), labels.chunk(parts), strict=True))


class Bytes(Task):
    """A transformer that predicts the next byte; `everything`: of what is installed beside torch, too."""

    def __init__(self, run: Run, everything: bool) -> None:
        self._run = run
        roots = [standard_library(), *([Path(torch.__file__).parents[1]] if everything else [])]
        train, held_out = zip(*(load(root) for root in roots), strict=True)
        self._train, self._held_out = torch.cat(train), torch.cat(held_out)

    def make_model(self) -> nn.Module:
        run = self._run
        return Gpt(
            Size(vocabulary=VOCABULARY, width=run.width, layers=run.layers, heads=run.heads, context=run.context)
        )

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return sample(self._train, self._run.batch, self._run.context, generator)

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        run = self._run
        inputs, targets = windows(self._held_out, run.batch * run.held_out_batches, run.context)
        return list(zip(inputs.split(run.batch), targets.split(run.batch), strict=True))


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + NOISE * torch.randn(images.shape, generator=generator)


def make_task(run: Run) -> Task:
    """The task of a run."""
    return Digits(run) if run.task == "digits" else Bytes(run, everything=run.task == "gpt")


def learning_rate_factor(step: int, run: Run) -> float:
    """A linear warm-up over half of the optimizer's own, then a cosine down to 0."""
    warmup = max(1, run.freeze_step // 2)
    progress = max(0, step - warmup) / max(1, run.steps - warmup)
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))


def load_digits() -> tuple[Tensor, Tensor]:
    """(1797, 8, 8) uint8 images with values up to 16, and (1797,) int64 labels."""
    try:
        from sklearn import datasets
    except ImportError:
        if not DIGITS.exists():
            raise SystemExit(
                f"the digits need scikit-learn, or {DIGITS} from a machine that has it: python examples/study.py digits"
            ) from None
        return _read_digits(DIGITS)
    found = datasets.load_digits()
    return torch.from_numpy(found.images).to(torch.uint8), torch.from_numpy(found.target).long()


def save_digits() -> Path:
    """Write the digits to where `load_digits` finds them on a machine without scikit-learn."""
    import numpy as np

    images, labels = load_digits()
    DIGITS.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(DIGITS, images=images.numpy(), labels=labels.to(torch.uint8).numpy())
    return DIGITS


def _read_digits(path: Path) -> tuple[Tensor, Tensor]:
    import numpy as np

    with np.load(path) as saved:
        return torch.from_numpy(saved["images"]), torch.from_numpy(saved["labels"]).long()
