"""What a user gets: a wheel with one top-level name, every file of the four packages, and nothing else."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "comm", "compress", "optim")
SHIPPED = {".py", ".cu", ".cuh"}


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd="/", env=os.environ | environment, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def source_files() -> set[str]:
    """The files that belong in a wheel, by the names that they have there, such as onebit/compress/codec.py."""
    return {
        f"onebit/{path.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if (path.suffix in SHIPPED or path.name == "py.typed") and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without network, from a copy: files of an older build in build/ would get into it."""
    work = tmp_path_factory.mktemp("wheel")
    made = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out")
    shutil.copytree(ROOT, work / "source", ignore=made)
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip_wheel, "--wheel-dir", str(work), str(work / "source"))
    (built,) = work.glob("*.whl")
    return built


def test_the_wheel_holds_exactly_the_files_of_the_packages_under_one_name(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    missing, surplus = source_files() - names, names - source_files()
    assert not missing, f"not in the wheel; does [tool.setuptools] list each sub-package? {sorted(missing)}"
    assert not surplus, f"in the wheel, but not in a package's folder: {sorted(surplus)}"


def test_every_package_says_that_it_is_typed(wheel: Path) -> None:
    assert {f"onebit/{package}/py.typed" for package in PACKAGES} <= set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_needs_no_more_than_it_must_and_carries_readme_and_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    fields = email.message_from_bytes(archive.read(metadata))
    required = {line.split(">=")[0] for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == {"torch", "numpy", "numba"}
    assert {"cuda12", "cuda13", "mpi", "bench"} <= set(fields.get_all("Provides-Extra", []))
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Description-Content-Type"] == "text/markdown"
    assert metadata.replace("METADATA", "licenses/LICENSE") in archive.namelist()


def test_an_installed_wheel_imports_from_where_it_was_installed(wheel: Path, tmp_path: Path) -> None:
    pip_install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip_install, "--target", str(tmp_path), str(wheel))
    version = wheel.name.split("-")[1]
    code = f"""
import importlib, importlib.metadata
for package in {PACKAGES!r}:
    module = importlib.import_module("onebit." + package)
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
assert importlib.metadata.version("onebit") == {version!r}
"""
    run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path))
