"""docs/architecture.md has a word on every file of the packages, and on none that is gone."""

from __future__ import annotations

import re
from pathlib import PurePath

import pytest

from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def files_of(package: str) -> set[str]:
    found = (path for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".cu", ".cuh"))
    return {path.relative_to(ROOT / package).as_posix() for path in found if path.name != "__init__.py"}


def names_in(package: str) -> set[str]:
    """What the tables of a package's section name: files, patterns of files, and folders."""
    section = re.search(rf"^## {package}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, f"there is no section on {package}"
    rows = re.findall(r"^\| `.*$", section[1], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([\w/*]+(?:/|\.py|\.cu|\.cuh))`", row)}


def meant_by(name: str, files: set[str]) -> set[str]:
    if name.endswith("/"):
        return {file for file in files if file.startswith(name)}
    return {file for file in files if file.count("/") == name.count("/") and PurePath(file).match(name)}


@pytest.mark.parametrize("package", ["compress", "comm", "optim", "benchmarks"])
def test_every_file_has_its_idea_in_the_tables_and_every_file_there_exists(package: str) -> None:
    files, names = files_of(package), names_in(package)
    gone = sorted(name for name in names if not meant_by(name, files))
    assert not gone, f"{package}/ has no longer what docs/architecture.md names: {gone}"
    unnamed = sorted(files - {file for name in names for file in meant_by(name, files)})
    assert not unnamed, f"docs/architecture.md says nothing of these files of {package}/: {unnamed}"
