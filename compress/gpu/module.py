"""Compiles a `.cu` file for the device at hand, and launches its kernels on torch's current stream."""

from __future__ import annotations

import functools
import re
import threading
from pathlib import Path
from typing import Any

import torch

from onebit.compress.forks import guard_forks
from onebit.compress.gpu.build import compile_source
from onebit.compress.gpu.driver import Launch, current_context

_FOLDER = Path(__file__).parent
THREADS = 256  # per thread block
PREPARED = 4096  # launches that are kept ready, some 300 bytes each
_loading = threading.Lock()


def launch(
    file: str | Path, kernel: str, device: torch.device, threads: int, *arguments: int, stream: int | None = None
) -> None:
    """Start `kernel` with at least `threads` threads, in blocks of 256, on a stream of `device`; none for 0.

    A launch with the same arguments as an earlier one is found prepared, which takes a few microseconds.

    Args:
        file: a source of this folder, or the whole path of another; it may include the headers of both folders.
        arguments: passed as 64-bit integers: numbers, or addresses from `Tensor.data_ptr`.
        stream: its handle; None: torch's current one.
    """
    if threads == 0:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    _prepared(file, kernel, index, threads, arguments)(stream)


@functools.lru_cache(PREPARED)
def _prepared(file: str | Path, kernel: str, device: int, threads: int, arguments: tuple[int, ...]) -> Launch:
    function, context = _function(file, kernel, device)
    return Launch(function.ptr, context, device, -(-threads // THREADS), THREADS, arguments)


def _function(file: str | Path, kernel: str, device: int) -> tuple[Any, int]:
    """A kernel on a device, and the context that it was loaded in."""
    with _loading:  # of two threads that load a module at once, one would keep a kernel of the one that is dropped
        return _loaded(file, kernel, device)


@functools.cache
def _loaded(file: str | Path, kernel: str, device: int) -> tuple[Any, int]:
    with torch.cuda.device(device):
        function = _module(file, device).get_function(kernel)
        context = current_context()
    assert context, "loading a module makes its context the thread's"
    return function, context


@functools.cache
def _module(file: str | Path, device: int) -> Any:
    from cupy.cuda import Module

    guard_forks()
    source = _FOLDER / file
    capability = torch.cuda.get_device_capability(device)
    module = Module()
    module.load(compile_source(with_headers(source), source.name, capability, (f"-DTHREADS={THREADS}",)))
    return module


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
