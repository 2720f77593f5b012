"""Compiles a CUDA source by NVRTC for one architecture; the machine code is kept on disk.

CuPy's own RawModule always asks for ``-ftz=true``: subnormal numbers become 0, which they are not on a CPU.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from onebit.compress.errors import OnebitError

_log = logging.getLogger(__name__)

# Products and sums are rounded one by one and subnormal numbers kept, as IEEE 754 asks: else bytes differ from a CPU's.
# A lambda in a kernel is a host function to NVRTC, which refuses it, unless functions are the device's by default.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--device-as-default-execution-space")


def compile_source(code: str, name: str, capability: tuple[int, int], defines: tuple[str, ...]) -> bytes:
    """Return the machine code of a source.

    Args:
        code: the source, all headers in it.
        name: of the source, for the compiler's messages.
        capability: compute capability of the device, such as (9, 0).
        defines: such as ``"-DTHREADS=256"``.

    Raises:
        OnebitError: the compiler refused; it says why.
    """
    from cupy.cuda import nvrtc

    options = (*OPTIONS, *defines, f"--gpu-architecture=sm_{capability[0]}{capability[1]}")
    key = repr((code, options, nvrtc.getVersion()))
    kept = _cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        made = _compile(nvrtc, code, name, options)
    _keep(kept, made)
    return made


def _compile(nvrtc: Any, code: str, name: str, options: tuple[str, ...]) -> bytes:
    program = nvrtc.createProgram(code, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        made: bytes = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise OnebitError(
            f"NVRTC cannot compile {name} with {' '.join(options)}: {error}; its log: {nvrtc.getProgramLog(program)} "
            "An NVRTC older than the device does not know its architecture: install the CuPy of a newer CUDA"
        ) from error
    finally:
        nvrtc.destroyProgram(program)
    return made


def _cache_folder() -> Path:
    """Where machine code is kept, beside what CuPy keeps if that was given a folder."""
    given = os.environ.get("CUPY_CACHE_DIR")
    if given:
        return Path(given) / "onebit"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "onebit"


def _keep(path: Path, content: bytes) -> None:
    """Write a file at once or not at all; ranks that start together may all write it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        _log.debug("onebit's CUDA kernels are compiled anew in every process: %s", error)
