"""The transformer of `examples/`, and the text that it learns, for whole training runs from a checkout."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXAMPLES = Path("examples")  # of the checkout that is the current folder; a wheel has no examples


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model's dimensions; `width` is a multiple of `heads`, and width / heads is even.

    The defaults have 10.7 million parameters.
    """

    vocabulary: int = 256
    width: int = 384
    layers: int = 6
    heads: int = 6
    context: int = 32


def make_model(shape: Shape, seed: int) -> nn.Module:
    """A model from tokens (batch, length) int64 to logits; the same weights wherever the seed is the same.

    Raises:
        SystemExit: this is no checkout.
    """
    gpt = _example("gpt")
    torch.manual_seed(seed)
    model: nn.Module = gpt.Gpt(gpt.Size(**vars(shape)))
    return model


class Text:
    """The sources of Python's standard library, as windows of bytes; files are either trained on or held out."""

    def __init__(self, length: int) -> None:
        self._text = _example("text")
        self._train, self._held_out = self._text.load()
        self._length = length

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and next bytes of `batch` random windows, two (batch, length) int64."""
        drawn: tuple[Tensor, Tensor] = self._text.sample(self._train, batch, self._length, generator)
        return drawn

    def held_out(self, count: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
        """A rank's share of `count` windows spread over the held-out files."""
        share: tuple[Tensor, Tensor] = self._text.windows(self._held_out, count, self._length, rank, size)
        return share


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


def _example(name: str) -> Any:
    """A module of `examples/`, whose modules find each other as scripts do."""
    folder = EXAMPLES.resolve()
    if not (folder / f"{name}.py").is_file():
        raise SystemExit("training runs take their model from examples/: start them in the root of a checkout")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)
