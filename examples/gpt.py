"""A small decoder-only transformer whose every parameter is a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Size:
    """The model's dimensions; `width` is a multiple of `heads`, and width / heads is even."""

    vocabulary: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128


class Gpt(nn.Module):
    """Maps tokens (batch, length) int64 to logits (batch, length, vocabulary).

    There are no biases and no gains: a 1-bit allreduce pads every tensor to whole blocks of 1024 elements, so a model
    of matrices only sends hardly any padding. The embedding is shared with the output layer.
    """

    rotation: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(size.vocabulary, size.width) / math.sqrt(size.width))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.register_buffer("rotation", _rotation(size.context, size.width // size.heads), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        rotation = self.rotation[:, : tokens.shape[1]]
        hidden = _norm(self.embedding[tokens])
        for block in self.blocks:
            hidden = block(hidden, rotation)
        return F.linear(_norm(hidden), self.embedding)


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer, each added to its input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = _linear(size.width, 3 * size.width)
        self.project = _linear(size.width, size.width, scale=1 / math.sqrt(2 * size.layers))
        self.expand = _linear(size.width, 4 * size.width)
        self.contract = _linear(4 * size.width, size.width, scale=1 / math.sqrt(2 * size.layers))

    def forward(self, hidden: Tensor, rotation: Tensor) -> Tensor:
        hidden = hidden + self.project(self._attend(self.qkv(_norm(hidden)), rotation))
        return hidden + self.contract(F.relu(self.expand(_norm(hidden))).square())

    def _attend(self, qkv: Tensor, rotation: Tensor) -> Tensor:
        batch, length, _ = qkv.shape
        query, key, value = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, -1)


def _linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(inputs))
    return layer


def _norm(hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:])


def _rotation(context: int, head_width: int) -> Tensor:
    """Cosines and sines of rotary position embedding (Su et al., 2021): (2, context, head_width / 2)."""
    frequency = 10000.0 ** -torch.linspace(0, 1, head_width // 2)
    angle = torch.arange(context)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


def _rotate(vectors: Tensor, rotation: Tensor) -> Tensor:
    cosine, sine = rotation
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
