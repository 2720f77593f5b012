"""Whether MPI reads CUDA tensors where they lie is asked of its library, however that is told."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from onebit.comm import mpi_backend


@pytest.mark.parametrize(
    ("library", "supported"),
    [
        ({}, False),
        ({"MPIX_Query_cuda_support": lambda: 0}, False),
        ({"MPIX_Query_cuda_support": lambda: 1}, True),
        ({"MPIX_GPU_query_support": lambda kind, answer: answer_with(answer, int(kind == 0))}, True),
        ({"MPIX_GPU_query_support": lambda kind, answer: answer_with(answer, 0)}, False),
        ({"MPIX_GPU_query_support": lambda kind, answer: answer_with(answer, 1, status=16)}, False),
        (None, False),
    ],
    ids=[
        "cannot tell",
        "Open MPI without",
        "Open MPI with",
        "MPICH with",
        "MPICH without",
        "MPICH fails",
        "no library",
    ],
)
def test_the_mpi_library_itself_is_asked_for_cuda_support(
    monkeypatch: pytest.MonkeyPatch, library: dict[str, Callable[..., int]] | None, supported: bool
) -> None:
    def load(path: str) -> SimpleNamespace:
        assert path == "the mpi4py module"
        if library is None:
            raise OSError("no such file")
        return SimpleNamespace(**library)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert mpi_backend.query_cuda_support(SimpleNamespace(__file__="the mpi4py module")) is supported


def answer_with(answer: Any, value: int, status: int = 0) -> int:
    answer._obj.value = value  # what byref() was given
    return status
