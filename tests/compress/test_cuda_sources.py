"""Every CUDA source compiles for the architectures we promise: by nvcc, and by NVRTC, which users' machines have.

NVRTC refuses some of what nvcc takes, and neither needs a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from onebit.compress.gpu.build import OPTIONS
from onebit.compress.gpu.module import with_headers

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("comm", "compress", "optim")
SOURCES = [source for package in PACKAGES for source in sorted((ROOT / package / "gpu").glob("*.cu"))]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cuda_source_compiles_without_warning(source: Path, architecture: str, tmp_path: Path) -> None:
    options = ["-std=c++17", "--fmad=false", "-DTHREADS=256", "-Werror=all-warnings", f"-arch={architecture}"]
    options.append("-diag-suppress=177")  # a constant of a header that this source does not use
    options += ["-Xcicc", "-O0", "-Xptxas", "-O0"]  # optimising says nothing more and takes four times as long
    (tmp_path / source.name).write_text(with_headers(source))  # as it is compiled on a machine with a GPU
    command = ["nvcc", "-cubin", *options, "-o", str(tmp_path / "out.cubin"), str(tmp_path / source.name)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr


def nvrtc_folder() -> Path | None:
    """Where pip put the compiler, with the part of it that it loads by itself."""
    package = importlib.util.find_spec("nvidia")
    places = package.submodule_search_locations if package else None
    return next((found.parent for place in places or [] for found in Path(place).rglob("libnvrtc.so.13")), None)


@pytest.mark.skipif(nvrtc_folder() is None, reason="no nvidia-cuda-nvrtc of CUDA 13")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cuda_source_compiles_at_run_time(source: Path) -> None:
    folder = nvrtc_folder()
    assert folder is not None
    for builtins in folder.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(folder / "libnvrtc.so.13"))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), with_headers(source).encode(), b"x.cu", 0, None, None) == 0
    # Hardly optimised, for that is a second where it would be half a minute.
    options = [*OPTIONS, "-DTHREADS=256", "--gpu-architecture=sm_90", "--Ofast-compile=max"]
    given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log.value.decode()
