"""A result document as the driver writes it, measured once for all tests that read one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from onebit.benchmarks import record
from onebit.benchmarks.__main__ import main


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> record.Document:
    """Kernels and averages of 4096 elements on two ranks that are threads."""
    folder = tmp_path_factory.mktemp("results")
    flags = ["-b16K", "-n3", "-w1", "--case=kernels,collectives", "--backend=threads", "--name=tiny"]
    assert main([*flags, f"--output={folder}"]) == 0
    [path] = Path(folder).glob("*.json")
    return record.load(path)


@pytest.fixture
def document(measured: record.Document) -> record.Document:
    """A copy of it that a test may change."""
    return copy.deepcopy(measured)
