"""Every transport moves the same bytes and counts them alike, whatever the dtype, size and number of ranks."""

from __future__ import annotations

import functools

import pytest
import torch.distributed as dist

from onebit.comm.backend import Backend
from onebit.comm.errors import BackendError
from onebit.comm.registry import make_backend
from tests.comm.checks import Check, Failures, assert_passed, failures_of, short
from tests.comm.launcher import GLOO, MPI, RANKS, run_ranks
from tests.comm.mpi_checks import (
    check_mpi_counts_beyond_its_limit,
    check_mpi_is_found_by_name_and_by_communicator,
    check_mpi_messages_of_the_user_do_not_collide_with_ours,
    check_mpi_second_backend_of_a_communicator_costs_no_second_duplicate,
    check_mpi_staged_tensors,
    check_mpi_sub_communicators,
)
from tests.comm.transport_checks import EVERYWHERE, exercise


def check_gloo_sub_groups(backend: Backend) -> None:
    for members in ([0], list(range(1, backend.size)), list(range(backend.size))):
        group = dist.new_group(members)
        if backend.rank in members:
            own = make_backend(group, timeout=backend.timeout)
            assert (own.name, own.rank, own.size) == ("gloo", members.index(backend.rank), len(members))
            exercise(own)
        else:
            with pytest.raises(BackendError, match=f"rank {backend.rank} is no member"):
                make_backend(group)


CHECKS = {
    "threads": EVERYWHERE,
    "gloo": [*EVERYWHERE, check_gloo_sub_groups],
    "mpi": [
        *EVERYWHERE,
        check_mpi_is_found_by_name_and_by_communicator,
        check_mpi_sub_communicators,
        check_mpi_messages_of_the_user_do_not_collide_with_ours,
        check_mpi_second_backend_of_a_communicator_costs_no_second_duplicate,
        check_mpi_counts_beyond_its_limit,
        check_mpi_staged_tensors,
    ],
}


@functools.cache
def failures_on(kind: str, world_size: int) -> list[Failures]:
    """All checks in one launch, for starting processes costs more than what they do."""
    results: list[Failures] = run_ranks(kind, world_size, failures_of, CHECKS[kind], timeout=90.0)
    return results


def report(kind: str, world_size: int, check: Check) -> None:
    assert_passed(failures_on(kind, world_size), check.__name__)


@pytest.mark.parametrize("check", EVERYWHERE, ids=short)
@pytest.mark.parametrize(("kind", "world_size"), RANKS)
def test_transport(kind: str, world_size: int, check: Check) -> None:
    report(kind, world_size, check)


@pytest.mark.parametrize(("kind", "world_size"), GLOO)
def test_gloo_sub_groups(kind: str, world_size: int) -> None:
    report(kind, world_size, check_gloo_sub_groups)


@pytest.mark.parametrize("check", [check for check in CHECKS["mpi"] if check not in EVERYWHERE], ids=short)
@pytest.mark.parametrize(("kind", "world_size"), MPI)
def test_mpi(kind: str, world_size: int, check: Check) -> None:
    report(kind, world_size, check)


@pytest.mark.parametrize("check", EVERYWHERE, ids=short)
def test_single(check: Check) -> None:
    check(make_backend("single"))
