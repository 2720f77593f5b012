"""Compiles a kernel on first use, once per machine: it is cached on disk under a key of sources and versions."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numba
from numba import int64, njit, void
from numba.core import config

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_kernels: dict[Callable[..., None], Callable[..., None]] = {}


def compile_kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function of int64 arguments that returns nothing; the GIL is released while it runs.

    Threads that ask for it at once get the same one. Ranks that start together with an empty cache take turns, so one
    compiles and the others load.
    """
    with _lock:
        if function not in _kernels:
            _kernels[function] = _compile(function)
        return _kernels[function]


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    signature = void(*[int64] * function.__code__.co_argcount)
    folder = _cache_folder(Path(function.__code__.co_filename).parent)
    if folder is not None:
        try:
            with _one_process(folder), _cache_in(folder):
                return njit(signature, nogil=True, error_model="numpy", cache=True)(function)  # type: ignore[no-any-return]
        except OSError as error:  # such as a full disk
            _say_uncached(error)
    return njit(signature, nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]


@functools.cache
def _cache_folder(own: Path) -> Path | None:
    """A folder for this version of the sources, or None where nothing can be written.

    Numba looks only at the file of the outermost function to decide whether cached code is stale; the kernels inline
    functions of other files, so the folder's name is a hash of all of them.

    Args:
        own: the folder of the kernel's file; it may use what is there and the functions for one block that are here.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    sources = [source for folder in sorted({own, here}) for source in sorted(folder.glob("*.py"))]
    for source in (*sources, here.parent / "reference.py"):
        digest.update(source.read_bytes())
    try:
        base = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "onebit" / digest.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "ab"):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        _say_uncached(error)
        return None


def _say_uncached(error: Exception) -> None:
    _log.warning(
        "onebit compiles its CPU kernels anew in every process, a few seconds each: its cache folder cannot be written "
        "(%s). Set NUMBA_CACHE_DIR to a folder that can",
        error,
    )


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; where the platform or the file system has no locks, go on without."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            _log.debug("no lock on the compile cache: %s", error)
        try:
            yield
        finally:  # closing is not enough: a child that another thread forked meanwhile has the file open, too
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before
