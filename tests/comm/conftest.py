"""What several files ask for: launches that are made once, and what carries numbers inside a node."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from onebit.comm.threads_backend import ThreadsBackend
from tests.comm.launcher import run_ranks
from tests.comm.nodes import SHARED
from tests.comm.samples import Trace, traces

Traces = dict[str, Trace]


@pytest.fixture(scope="session")
def process_traces() -> Callable[[str, int], list[Traces]]:
    """Every rank's `traces` over processes, given the kind of transport and the number of ranks."""

    @functools.cache
    def launch(kind: str, world_size: int) -> list[Any]:
        return run_ranks(kind, world_size, traces)

    return launch


@pytest.fixture(params=[SHARED, "threads"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What carries numbers inside a node of threads: their backend; or memory, as if they were processes."""
    name: str = request.param
    monkeypatch.setattr(ThreadsBackend, "in_processes", name == SHARED)
    return name
