"""Compiles a `.cu` file for the device at hand, and launches its kernels on torch's current stream."""

from __future__ import annotations

import functools
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
THREADS = 256  # per thread block


def launch(file: str | Path, kernel: str, device: torch.device, threads: int, *arguments: int) -> None:
    """Start `kernel` with at least `threads` threads, in blocks of 256, on the current stream of `device`.

    Args:
        file: a source of this folder, or the whole path of another; it may include the headers of both folders.
        arguments: passed as 64-bit integers: numbers, or addresses from `Tensor.data_ptr`.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index):
        stream = _Stream(torch.cuda.current_stream(index).cuda_stream)
        _function(file, kernel, index)((-(-threads // THREADS),), (THREADS,), arguments, 0, stream)


@functools.cache
def _function(file: str | Path, kernel: str, device: int) -> Any:
    """A kernel, ready on a device that is the current one."""
    return _module(file, device).get_function(kernel).kernel


@functools.cache
def _module(file: str | Path, device: int) -> Any:
    import cupy

    # CuPy keeps the compiled code on disk, under a key of this text, the options and the compiler's version. Products
    # and sums are rounded one by one: contraction would change the last bit.
    code = with_headers(_FOLDER / file)
    return cupy.RawModule(code=code, options=("--std=c++17", "--fmad=false", f"-DTHREADS={THREADS}"))


def with_headers(source: Path) -> str:
    """The text of a source, each header that it includes in its place once: one of its own folder, or else of ours."""
    seen: set[Path] = set()

    def text(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        lines = path.read_text().replace("#pragma once\n", "")
        return re.sub(r'^#include "(.+)"$', lambda name: text(_header(path.parent, name[1])), lines, flags=re.MULTILINE)

    return text(source)


def _header(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).exists() else _FOLDER / name


@dataclass(frozen=True)
class _Stream:
    """torch's stream, as far as CuPy looks at it."""

    ptr: int
