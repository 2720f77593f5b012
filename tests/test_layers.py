"""Imports run one way, optim → comm → compress, and nothing optional is imported before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What the modules of a package may import from this project.
ALLOWED = {
    "compress": {"compress"},
    "comm": {"comm", "compress"},
    "optim": {"optim", "comm", "compress"},
    "benchmarks": {"benchmarks", "optim", "comm", "compress"},
}
# Packages that a module may not name at all, wherever in the module it does.
FORBIDDEN = {"compress": ("torch.distributed", "mpi4py"), "optim": ("torch.distributed", "mpi4py")}
OPTIONAL = ("cupy", "mpi4py")
PLOTTING = ("matplotlib", "rich", "tqdm")

# Prepended to a subprocess: packages that are not there, whatever is installed.
ABSENT = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (the test takes it away)", name=name)
sys.meta_path.insert(0, Absent())
"""


def module_files(package: str) -> list[Path]:
    """The sources of one package, named after what they are, such as compress/cpu/kernels.py."""
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """``compress/cpu/__init__.py`` is ``onebit.compress.cpu``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("onebit", *parts[: -1 if parts[-1] == "__init__" else None]))


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a module imports, inside functions and TYPE_CHECKING blocks too.

    ``from a import b`` counts as ``a.b``, for b may be a module.
    """
    inside = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def dotted_uses(path: Path, dotted: str) -> Iterator[int]:
    """Lines that reach a module through its parent, as ``torch.distributed`` after ``import torch``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == dotted:
            yield node.lineno


def run(code: str) -> None:
    """Run code in a fresh interpreter, away from the source tree; its traceback is the failure."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr


def imports_only(package: str, unwanted: list[str]) -> str:
    """Code that fails if importing a package imports an unwanted module that torch has not imported before it."""
    return f"""
import sys, torch
torchs = set(sys.modules)
import onebit.{package}
found = sorted(name for name in {unwanted!r} if name in sys.modules and name not in torchs)
assert not found, f"import onebit.{package} imports {{found}}"
"""


@pytest.mark.parametrize("package", ALLOWED)
def test_a_layer_names_only_itself_and_the_layers_below(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in module_files(package)
        for line, name in imported_names(path)
        if is_within(name, "onebit") and name.split(".")[1] not in ALLOWED[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_layer_does_not_name_what_is_not_its_business(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} uses {forbidden}"
        for path in module_files(package)
        for forbidden in FORBIDDEN[package]
        for line in [
            *(line for line, name in imported_names(path) if is_within(name, forbidden)),
            *(dotted_uses(path, forbidden) if "." in forbidden else ()),
        ]
    ]
    assert not wrong


def test_nothing_names_a_package_by_its_folder() -> None:
    """From the repository's root ``import compress`` works, and would be a second copy of ``onebit.compress``."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for folder in (*ALLOWED, "tests", "examples")
        for path in module_files(folder)
        for line, name in imported_names(path)
        if name.split(".")[0] in ALLOWED
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["compress", "comm", "optim"])
def test_a_layer_imports_alone_and_imports_nothing_optional(package: str) -> None:
    above = [f"onebit.{other}" for other in ALLOWED if other not in ALLOWED[package]]
    run(imports_only(package, [*above, *OPTIONAL, *PLOTTING, "numba"]))


def test_every_module_imports_with_cupy_mpi4py_and_plotting_absent() -> None:
    modules = [module_name(path) for package in ALLOWED for path in module_files(package)]
    run(
        ABSENT.format(names={*OPTIONAL, *PLOTTING})
        + f"import importlib\nfor name in {modules!r}:\n    importlib.import_module(name)"
    )
