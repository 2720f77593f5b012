"""Ranks with other gradients missing and other numbers of batches neither block each other nor drift apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from onebit.comm import Backend, InputError, TransportError, run_threads
from onebit.optim import CompressedOptimizer, ZeroOneAdam, check_replicas, in_step
from tests.comm.launcher import needs_mpi, run_ranks
from tests.faults.training import MAKERS
from tests.optim.samples import checksum, contents, values

SHAPES = ((7, 5), (11,), (), (40,))
LEAST, MOST = 4, 14  # batches of a rank; the longest has them all, which meets every phase

# Per rank, per batch, whether each parameter gets a gradient.
Work = list[list[tuple[bool, ...]]]


def works(world_size: int) -> st.SearchStrategy[Work]:
    batch = st.tuples(*[st.sampled_from([True, True, True, False])] * len(SHAPES))
    some = st.lists(st.lists(batch, max_size=MOST), min_size=world_size - 1, max_size=world_size - 1)
    return st.tuples(some, st.lists(batch, min_size=LEAST, max_size=MOST)).map(lambda drawn: [*drawn[0], drawn[1]])


def train(
    backend: Backend, name: str, work: Work, filled: bool, counted: bool, overlap: bool = False
) -> tuple[str, int]:
    """Train on this rank's batches.

    filled: with zeros for gradients that only other ranks have; overlap: gradients are sent while backward makes them.
    """
    params = [Parameter(values(i, shape=shape)) for i, shape in enumerate(SHAPES)]
    optimizer: CompressedOptimizer = MAKERS[name](
        params, lr=1e-2, backend=backend, overlap=overlap, bucket_mb=2**-12 if overlap else None
    )
    batches: Iterable[tuple[bool, ...]] = work[backend.rank]
    made = 0
    for number, batch in enumerate(in_step(batches if counted else iter(batches), optimizer)):
        optimizer.zero_grad()
        used = []
        for i, p in enumerate(params):
            others = any(number < len(theirs) and theirs[number][i] for theirs in work)
            if batch is not None and batch[i]:
                used.append((p * values(i, number, backend.rank, shape=tuple(p.shape))).sum())
            elif filled and others:
                used.append((p * 0).sum())
        if used:
            torch.stack(used).sum().backward()
        optimizer.step()
        made += 1
    if isinstance(optimizer, ZeroOneAdam):
        optimizer.synchronize()
    check_replicas(optimizer)
    return checksum(contents(optimizer)), made


@settings(max_examples=12, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(MAKERS)), counted=st.booleans())
def test_what_a_rank_lacks_counts_as_zeros_whatever_the_pattern(data: st.DataObject, name: str, counted: bool) -> None:
    size = data.draw(st.sampled_from([2, 3]))
    work = data.draw(works(size))
    told = run_threads(size, train, name, work, False, counted)
    assert len(set(told)) == 1
    assert told[0][1] == max(map(len, work))
    assert told == run_threads(size, train, name, work, True, counted)
    assert told == run_threads(size, train, name, work, False, counted, True)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("gloo", name) for name in MAKERS), pytest.param("mpi", "ZeroOneAdam", marks=[pytest.mark.mpi, needs_mpi])],
)
def test_real_processes_do_the_same_as_threads(kind: str, name: str) -> None:
    rows = [[(True, (k + r) % 3 > 0, k % 2 == r, (k * r) % 4 != 1) for k in range(5 + 4 * r)] for r in range(2)]
    assert run_ranks(kind, 2, train, name, rows, False, False) == run_threads(2, train, name, rows, False, True)


class Mislabelled:
    """Says that it has more than it has."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def pull(backend: Backend, batches: list[Any], until: Literal["last", "first"]) -> list[Any]:
    return list(in_step(batches[backend.rank], backend, until=until))


def test_ranks_end_with_the_last_or_with_the_first() -> None:
    lists: list[Any] = [[1, 2, 3], [4], []]
    filled = [[1, 2, 3], [4, None, None], [None, None, None]]
    assert run_threads(3, pull, lists, "last") == filled
    assert run_threads(3, pull, [iter(one) for one in lists], "last") == filled
    assert run_threads(3, pull, [lists[0], iter(lists[1]), lists[2]], "last") == filled  # one does not know
    assert run_threads(2, pull, lists, "first") == [[1], [4]]
    assert run_threads(2, pull, [iter(one) for one in lists[:2]], "first") == [[1], [4]]
    assert run_threads(1, pull, lists, "last") == [[1, 2, 3]]
    assert run_threads(2, pull, [[], []], "last") == [[], []]


def test_one_who_leaves_early_is_an_error_for_the_others_and_no_hang() -> None:
    def leave(backend: Backend) -> None:
        backend.timeout = 0.5
        for number, _ in enumerate(in_step(iter(range(5)), backend)):
            if backend.rank == 1 and number == 2:
                return
        raise AssertionError("rank 0 came to the end")

    with pytest.raises(TransportError):
        run_threads(2, leave)


def test_wrong_calls_are_refused() -> None:
    def ask(backend: Backend) -> None:
        with pytest.raises(InputError, match=r'until must be "last" or "first", got \'both\''):
            in_step([1], backend, until="both")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="there were 3 batches, and their length said 5"):
            list(in_step(Mislabelled(), backend))

    run_threads(1, ask)
