"""Every CUDA source compiles for the architectures we promise, where nvcc is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from onebit.compress.gpu.module import with_headers

ROOT = Path(__file__).parent.parent.parent
SOURCES = [source for package in ("compress", "optim") for source in sorted((ROOT / package / "gpu").glob("*.cu"))]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cuda_source_compiles_without_warning(source: Path, architecture: str, tmp_path: Path) -> None:
    options = ["-std=c++17", "--fmad=false", "-DTHREADS=256", "-Werror=all-warnings", f"-arch={architecture}"]
    options.append("-diag-suppress=177")  # a constant of a header that this source does not use
    (tmp_path / source.name).write_text(with_headers(source))  # as it is compiled on a machine with a GPU
    command = ["nvcc", "-cubin", *options, "-o", str(tmp_path / "out.cubin"), str(tmp_path / source.name)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
