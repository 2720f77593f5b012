"""Ranks that differ, or bring what cannot be averaged, are all told in one clear error before anything moves."""

from __future__ import annotations

import functools
import itertools
import re
import time
from typing import Any

import pytest
import torch

from onebit.comm import Backend, CompressedAllreduce, DenseAllreduce, InputError, MismatchError, agree, run_threads
from tests.comm.disagreements import (
    AVERAGES,
    CASES,
    OPERATIONS,
    SUBJECTS,
    Outcome,
    applies,
    counted,
    observe_all,
    send_cpu_tensors_over_nccl,
)
from tests.comm.launcher import needs_mpi, run_ranks

GROUPS = (("threads", 2), ("threads", 3), ("gloo", 3), ("mpi", 2))
CALLS = [
    pytest.param(
        *(kind, size, name, operation),
        id=f"{kind}-{size}-{operation}-{name}",
        marks=[pytest.mark.mpi, needs_mpi] if kind == "mpi" else [],
    )
    for (kind, size), name, operation in itertools.product(GROUPS, CASES, OPERATIONS)
    if applies(CASES[name], operation, kind)
]
SECONDS = 20.0  # no collective may take longer, so that a rank left alone fails and does not wait for its peers


@functools.cache
def launched(kind: str, world_size: int) -> list[dict[tuple[str, str], Outcome]] | Exception:
    try:
        return run_ranks(kind, world_size, observe_all, backend_timeout=SECONDS)
    except Exception as error:  # kept too, for a failure takes long
        return error


def observed(kind: str, world_size: int) -> list[dict[tuple[str, str], Outcome]]:
    seen = launched(kind, world_size)
    if isinstance(seen, Exception):
        raise seen
    return seen


def ranks(numbers: range) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


@pytest.mark.parametrize(("kind", "world_size", "name", "operation"), CALLS)
def test_every_rank_is_told_the_first_difference_and_who_holds_what_and_nothing_changes(
    kind: str, world_size: int, name: str, operation: str
) -> None:
    case, last = CASES[name], world_size - 1
    for rank, told in enumerate(seen[name, operation] for seen in observed(kind, world_size)):
        assert told.unchanged
        assert told.moved == 0
        here = f"rank {rank}: {SUBJECTS[operation]}: "
        if case.refused is not None and (rank == last or case.fact is None):
            assert told.error == "InputError"
            assert re.fullmatch(f"{here}{case.refused}.*", told.message), told.message
        else:
            assert told.error == "MismatchError"
            holders = f"{ranks(range(last))}: {case.usual}; {ranks(range(last, world_size))}: {case.odd}"
            pattern = rf"{here}ranks do not agree on {case.fact}: {holders}\. Nothing was exchanged or changed\. .*"
            assert re.fullmatch(pattern, told.message), told.message
            if case.refused is not None:
                assert re.search(f"rank {last}: {SUBJECTS[operation]}: {case.refused}", told.message), told.message


def test_cpu_tensors_given_to_nccl_are_refused_on_every_rank_with_the_remedy() -> None:
    for rank, seen in enumerate(run_ranks("gloo", 2, send_cpu_tensors_over_nccl, backend_timeout=SECONDS)):
        for operation in AVERAGES:
            told = seen[operation]
            assert (told.error, told.unchanged, told.moved) == ("BackendError", True, 0)
            expected = f"rank {rank}: the 'nccl' backend carries cuda tensors, and these are on cpu; move them, or name"
            assert told.message.startswith(expected)


def test_more_than_two_opinions_are_all_told() -> None:
    def differ(backend: Backend) -> str:
        with pytest.raises(MismatchError) as told:
            CompressedAllreduce(torch.ones((3, 4, 3, 5)[backend.rank]), backend)
        return str(told.value)

    for rank, message in enumerate(run_threads(4, differ)):
        assert message.startswith(f"rank {rank}: CompressedAllreduce: ranks do not agree on tensor 0: ")
        assert r"ranks 0, 2: float32 (3,); rank 1: float32 (4,); rank 3: float32 (5,)." in message


def test_ranks_that_make_different_calls_are_told_so() -> None:
    def differ(backend: Backend) -> str:
        make: Any = (CompressedAllreduce, DenseAllreduce)[backend.rank]
        with pytest.raises(MismatchError) as told:
            make(torch.ones(3), backend)
        return str(told.value)

    for message in run_threads(2, differ):
        assert "do not agree on subject: rank 0: CompressedAllreduce; rank 1: DenseAllreduce" in message


# --- the comparison itself


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_agreement_costs_one_collective_of_32_bytes_however_many_facts_there_are(world_size: int) -> None:
    def compare(backend: Backend, facts: int) -> tuple[int, int]:
        agree(backend, "a test", {f"fact {i}": "x" * 100 for i in range(facts)})
        return backend.traffic.collectives, backend.traffic.wire_bytes

    for facts in (0, 1, 1000):
        expected = (int(world_size > 1), 32 * (world_size - 1))
        assert run_threads(world_size, compare, facts) == [expected] * world_size


def test_the_first_fact_that_differs_is_told_also_when_only_some_ranks_have_it() -> None:
    def compare(backend: Backend) -> str:
        facts = {"same": "1", "only some": "2", "also different": str(backend.rank)}
        if backend.rank == 1:
            del facts["only some"]
        with counted(backend) as moved, pytest.raises(MismatchError) as told:
            agree(backend, "a test with letters beyond ASCII: é, 数", facts)
        assert moved == []
        agree(backend, "a test", {"same": "1"})
        return str(told.value)

    for message in run_threads(3, compare):
        assert "a test with letters beyond ASCII: é, 数: ranks do not agree on only some: " in message
        assert "ranks 0, 2: 2; rank 1: none. Nothing" in message


def test_the_order_in_which_ranks_list_their_facts_is_no_difference() -> None:
    """As options in another order, after a rank has loaded a state that lists them so."""

    def check(backend: Backend) -> None:
        facts = {"lr": "1", "eps": "2", "betas": "3"}
        agree(backend, "step", facts if backend.rank else dict(reversed(facts.items())))

    run_threads(3, check)


def test_a_refusal_is_raised_where_it_arose_and_told_to_the_others_before_any_other_difference() -> None:
    def compare(backend: Backend) -> str:
        refusal = InputError("too blue") if backend.rank == 1 else None
        with pytest.raises(InputError if backend.rank == 1 else MismatchError) as told:
            agree(backend, "a test", {"colour": str(backend.rank)}, refusal)
        return str(told.value)

    first, second, third = run_threads(3, compare)
    assert second == "too blue"
    for message in (first, third):
        assert "do not agree on their input: ranks 0, 2: accepted; rank 1: refused: too blue." in message


def test_ranks_that_all_refuse_each_raise_their_own_error() -> None:
    def compare(backend: Backend) -> None:
        with pytest.raises(InputError, match=f"^{backend.rank} is no good$"):
            agree(backend, "a test", {}, InputError(f"{backend.rank} is no good"))

    run_threads(3, compare)


def test_one_rank_alone_agrees_with_itself_and_still_refuses() -> None:
    def compare(backend: Backend) -> None:
        agree(backend, "a test", {"colour": "blue"})
        with pytest.raises(InputError, match="too blue"):
            agree(backend, "a test", {}, InputError("too blue"))

    run_threads(1, compare)


def test_a_disagreement_ends_at_once_and_not_by_a_timeout() -> None:
    def differ(backend: Backend) -> float:
        start = time.monotonic()
        with pytest.raises(MismatchError):
            CompressedAllreduce(torch.ones(3 + backend.rank), backend)
        return time.monotonic() - start

    assert max(run_threads(4, differ)) < SECONDS / 4


def test_no_two_cases_are_the_same() -> None:
    for (_, one), (_, other) in itertools.combinations(CASES.items(), 2):
        assert one != other
