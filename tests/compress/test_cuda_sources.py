"""Every CUDA source compiles for the architectures we promise, where nvcc is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted(Path(__file__).parent.parent.parent.joinpath("compress", "gpu").glob("*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_cuda_source_compiles_without_warning(source: Path, architecture: str, tmp_path: Path) -> None:
    options = ["-std=c++17", "--fmad=false", "-DTHREADS=256", "-Werror=all-warnings", f"-arch={architecture}"]
    command = ["nvcc", "-cubin", *options, "-o", str(tmp_path / "out.cubin"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
