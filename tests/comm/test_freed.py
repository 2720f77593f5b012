"""Averages that nobody holds are freed at once, with their buffers and error feedback."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from onebit.comm import (
    Backend,
    CompressedAllreduce,
    CompressedReduceScatter,
    DenseAllreduce,
    TransportError,
    run_threads,
)
from tests.comm.samples import normal
from tests.garbage import tensors_left_to_the_collector

Use = Callable[[Backend], None]


def compressed(backend: Backend, local_group: int | None = None) -> None:
    average = CompressedAllreduce([normal(0), normal(1)], backend, local_group=local_group, bucket_mb=0.005)
    average([normal(0, backend.rank), normal(1, backend.rank)])
    average.start([normal(0, backend.rank), normal(1, backend.rank)]).wait()


def two_level(backend: Backend) -> None:
    compressed(backend, local_group=2)


def dense(backend: Backend) -> None:
    average = DenseAllreduce([normal(0)], backend)
    average([normal(0, backend.rank)])
    average.start([normal(0, backend.rank)]).wait()


def scattered(backend: Backend) -> None:
    scatter = CompressedReduceScatter([normal(0)], backend)
    scatter.start([normal(0, backend.rank)]).wait()
    scatter([normal(1, backend.rank)])


def failed(backend: Backend) -> None:
    average = CompressedAllreduce([normal(0)], backend)
    if backend.rank:
        with pytest.raises(TransportError):
            average([normal(0, backend.rank)])


@pytest.fixture(autouse=True, scope="module")
def once() -> None:
    """What is made once, such as kernels, is made before."""
    run_threads(4, compressed)


@pytest.mark.parametrize("use", [compressed, two_level, dense, scattered, failed], ids=lambda f: f.__name__)
def test_no_tensor_is_left_when_an_average_is_dropped(use: Use) -> None:
    with tensors_left_to_the_collector() as left:
        run_threads(4, use, timeout=2.0)
    assert left == []
