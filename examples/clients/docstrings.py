"""A task made of real text: which installed package is a docstring's first paragraph from?"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("torch", "sympy", "scipy", "sklearn", "matplotlib", "networkx")
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor"}
FEWEST_WORDS = 4
HELD_OUT_SHARE = 0.4  # of the files

Sample = tuple[str, int]  # text and number of its package


def load(train: int, held_out: int) -> tuple[list[Sample], list[Sample]]:
    """So many samples of every package to train with and to test on, always the same for the same versions.

    A file's docstrings belong to one of the two, chosen by a hash of its name, and no text is there twice.
    """
    seen: set[str] = set()
    parts: tuple[list[Sample], list[Sample]] = [], []
    for label, package in enumerate(PACKAGES):
        wanted = [train, held_out]
        for path, tested in _files(package):
            for text in _paragraphs(path) if wanted[tested] else ():
                if wanted[tested] and text not in seen:
                    seen.add(text)
                    parts[tested].append((text, label))
                    wanted[tested] -= 1
            if not any(wanted):
                break
    return parts


def _files(package: str) -> Iterator[tuple[Path, bool]]:
    """A package's sources in the order of the hashes of their names, and whether each is held out."""
    found = find_spec(package)
    assert found is not None
    assert found.origin is not None, f"{package} is no package with sources"
    root = Path(found.origin).parent
    hashed = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts):
            hashed[hashlib.sha256(f"{package}/{name.as_posix()}".encode()).digest()] = path
    for digest in sorted(hashed):
        yield hashed[digest], digest[-1] < HELD_OUT_SHARE * 256


def _paragraphs(path: Path) -> Iterator[str]:
    """The first paragraphs of a file's docstrings, each in one line."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            words = (ast.get_docstring(node) or "").partition("\n\n")[0].split()
            if len(words) >= FEWEST_WORDS:
                yield " ".join(words)
