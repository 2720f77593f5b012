"""Which ranks are a node: a number, a backend or the launcher says so, and all ranks agree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.distributed as dist

from onebit.comm import Backend, CompressedAllreduce, InputError, MismatchError, make_backend, run_threads
from onebit.compress import SignCodec
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, normal


def test_a_backend_names_the_node_and_levels_are_made_once() -> None:
    def average(backend: Backend) -> list[bytes]:
        odd = backend.split(backend.rank % 2)  # nodes {0, 2} and {1, 3}
        x = normal(backend.rank)
        reduce = CompressedAllreduce(x, backend, local_group=odd)
        assert reduce.levels is not None
        assert reduce.levels.inside is odd
        before = backend.traffic.collectives
        assert CompressedAllreduce(x, backend, local_group=odd).levels is reduce.levels
        assert backend.traffic.collectives == before + 2  # to agree on the levels, and on the tensors
        reduce(x)
        return bits(x)

    def neighbours(backend: Backend) -> list[bytes]:
        x = normal([0, 2, 1, 3][backend.rank])
        CompressedAllreduce(x, backend, local_group=2)(x)
        return bits(x)

    assert run_threads(4, average) == run_threads(4, neighbours)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
        os.environ.update(before)


def find(backend: Backend, numberings: list[tuple[list[int], int]]) -> list[list[int] | str]:
    """Per numbering by a launcher, the ranks that are this rank's node; or what is wrong."""
    return [_node_of(make_backend(dist.group.WORLD), numbers, size) for numbers, size in numberings]


def _node_of(backend: Backend, numbers: list[int], local_size: int) -> list[int] | str:
    variables = {"LOCAL_RANK": str(numbers[backend.rank]), "LOCAL_WORLD_SIZE": str(local_size)}
    with environment(variables):
        try:
            reduce = CompressedAllreduce(torch.zeros(3000), backend, local_group="auto")
        except InputError as error:
            return str(error)
    if reduce.levels is None:
        return [backend.rank]
    mine = torch.tensor([backend.rank])
    everyone = mine.new_empty(reduce.levels.inside.size)
    reduce.levels.inside.all_gather(everyone, mine).wait()
    return [int(rank) for rank in everyone]


def test_auto_takes_the_ranks_of_one_machine_from_the_launcher() -> None:
    pairs, turns, alone = ([0, 1] * 3, 2), ([0, 0, 0, 1, 1, 1], 2), ([0] * 6, 1)
    uneven, mixed = ([0, 1, 2, 3, 0, 1], 4), ([0, 1, 1, 0, 0, 1], 2)
    for rank, found in enumerate(run_ranks("gloo", 6, find, [pairs, turns, alone, uneven, mixed])):
        first = rank // 2 * 2
        assert found[:3] == [[first, first + 1], [rank % 3, rank % 3 + 3], [rank]]
        assert "expected all nodes to have as many ranks, got nodes of 2, 4" in found[3]
        assert f"rank {rank}: local_group='auto': expected the ranks of a machine to be numbered" in found[4]


def test_what_is_no_local_group_is_refused_on_all_ranks() -> None:
    def refuse(backend: Backend) -> None:
        x = torch.zeros(3000)
        where = f"rank {backend.rank}: local_group="
        for wrong, expected in (
            (3, f"{where}3: expected a number of ranks that divides all 4 of them"),
            (0, f"{where}0: expected a number of ranks"),
            ("node", f"{where}'node': expected None, 'auto'"),
            (True, f"{where}True: expected None, 'auto'"),
        ):
            with pytest.raises(InputError, match=expected):
                CompressedAllreduce(x, backend, local_group=wrong)
        with pytest.raises(InputError, match="local_group= is for mode='compressed', got mode='plain'"):
            CompressedAllreduce(x, backend, mode="plain", local_group=2)
        with pytest.raises(InputError, match="local_group= needs a codec with blocks"):
            CompressedAllreduce(x, backend, SignCodec(block_size=None), local_group=2)
        with pytest.raises((InputError, MismatchError), match=r"expected a number of ranks that divides|rank 1"):
            CompressedAllreduce(x, backend, local_group=3 if backend.rank == 1 else 2)
        with pytest.raises(MismatchError, match="do not agree on local_group: ranks 0, 2: 2; ranks 1, 3: 4"):
            CompressedAllreduce(x, backend, local_group=4 if backend.rank % 2 else 2)
        uneven = backend.split(int(backend.rank == 0))
        with pytest.raises(
            MismatchError, match="local_group: rank 0: a Backend of 1 ranks; ranks 1, 2, 3: a Backend of 3"
        ):
            CompressedAllreduce(x, backend, local_group=uneven)

    run_threads(4, refuse)
