"""Bytes to learn from: the sources of Python's own standard library, split by file into training and held-out text."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256  # a token is a byte
HELD_OUT_SHARE = 10  # one file in so many is held out
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def standard_library() -> Path:
    """The folder of the standard library's Python sources."""
    return Path(sysconfig.get_path("stdlib"))


def load(root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Read all sources below `root` (default: the standard library).

    Returns:
        train, held_out: two 1-D uint8 tensors. A file belongs to one of them, chosen by a hash of its name relative to
        `root`, so every rank and every run on one Python version sees the same split.
    """
    root = standard_library() if root is None else root
    train, held_out = bytearray(), bytearray()
    for path in _sources(root):
        (held_out if _is_held_out(path.relative_to(root)) else train).extend(path.read_bytes())
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def sample(text: Tensor, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `batch` windows of `length` bytes at random; returns inputs and next bytes, two (batch, length) int64."""
    starts = torch.randint(text.numel() - length, (batch,), generator=generator)
    return _windows(text, starts, length)


def windows(text: Tensor, count: int, length: int, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    """Rank's share of `count` windows spread evenly over `text`: inputs and next bytes, two (share, length) int64."""
    starts = torch.linspace(0, text.numel() - length - 1, count, dtype=torch.float64).long()
    return _windows(text, starts[rank::size], length)


def _windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    chunk = text[starts[:, None] + torch.arange(length + 1)].long()
    return chunk[:, :-1], chunk[:, 1:]


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if path.is_file() and SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield path


def _is_held_out(name: Path) -> bool:
    return hashlib.sha256(name.as_posix().encode()).digest()[0] % HELD_OUT_SHARE == 0
