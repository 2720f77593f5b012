"""Launches that several files look at are made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.comm.launcher import run_ranks
from tests.comm.samples import Trace, traces

Traces = dict[str, Trace]


@pytest.fixture(scope="session")
def process_traces() -> Callable[[str, int], list[Traces]]:
    """Every rank's `traces` over processes, given the kind of transport and the number of ranks."""

    @functools.cache
    def launch(kind: str, world_size: int) -> list[Any]:
        return run_ranks(kind, world_size, traces)

    return launch
