"""Striped collectives bring what whole ones bring, and ranks stripe all or not at all; the GPU tests have NCCL's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from onebit.comm import Backend, BackendError, run_threads, striping
from onebit.comm.striping import SWITCH, StripedCollective, Stripes, Wanted
from onebit.comm.threads_backend import ThreadsBackend
from onebit.comm.torch_backend import TorchBackend

RANKS = 3
OPERATIONS = ("all_to_all", "all_gather")


def rank_here() -> int:
    backend = ThreadsBackend.current()
    assert backend is not None
    return backend.rank


def send(backend: Backend, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
    """As `TorchBackend.send`, by an all_to_all of pieces of one size, as the stripes of a collective have."""
    got = torch.empty_like(torch.cat(outputs))
    backend.all_to_all(got, torch.cat(inputs)).wait()
    for output, piece in zip(outputs, got.view(backend.size, -1), strict=True):
        output.copy_(piece)


Wishes = Callable[..., None]


@pytest.fixture
def wishing(monkeypatch: pytest.MonkeyPatch) -> Wishes:
    """Has ranks want stripes, be on machines and find stripes so many times as fast, as told, by rank."""

    def set_up(wanted: list[Wanted], machines: list[int] | None = None, faster: float = 1.0) -> None:
        monkeypatch.setattr(striping, "_wanted", lambda backend: wanted[backend.rank])
        monkeypatch.setattr(striping, "machine", lambda: (machines or [7] * RANKS)[rank_here()])
        monkeypatch.setattr(striping, "LEAST", 1)
        monkeypatch.setattr(striping, "medians", lambda backend, device, calls: [faster, 1.0])
        monkeypatch.setattr(ThreadsBackend, "send", send, raising=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    return set_up


def told(count: int) -> list[Wanted]:
    return [Wanted(count, count, True)] * RANKS


def pieces_of(rank: int, operation: str, piece: int, call: int) -> np.ndarray:
    """(pieces, piece) uint8: what a rank sends."""
    pieces = RANKS if operation == "all_to_all" else 1
    return np.random.default_rng([rank, call]).integers(0, 256, (pieces, piece), "u1")


def expected_on(rank: int, operation: str, piece: int, call: int) -> np.ndarray:
    own = rank if operation == "all_to_all" else 0
    return np.stack([pieces_of(other, operation, piece, call)[own] for other in range(RANKS)])


def started(backend: Backend, operation: str, piece: int, calls: int = 3) -> tuple[int | None, list[bool], int]:
    """What a rank's backend has of stripes after some calls, whether each was right, and what was counted of them."""
    over = cast(TorchBackend, backend)
    stripes = Stripes(over)
    rows = RANKS if operation == "all_to_all" else 1
    output, input = torch.zeros(RANKS * piece, dtype=torch.uint8), torch.zeros(rows * piece, dtype=torch.uint8)
    collective = StripedCollective(over, stripes, operation, output, input, 1000)
    right = []
    for call in range(calls):
        input.copy_(torch.from_numpy(pieces_of(backend.rank, operation, piece, call)).view(-1))
        output.zero_()
        collective.start(in_line=call % 2 == 0).wait()
        right.append(np.array_equal(output.view(RANKS, -1).numpy(), expected_on(backend.rank, operation, piece, call)))
    return stripes.count, right, backend.traffic.wire_bytes


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("piece", [1, 15, 16, 48, 5000])
def test_every_piece_arrives_whole(wishing: Wishes, operation: str, count: int, piece: int) -> None:
    wishing(told(count))
    for stripes, right, *_ in run_threads(RANKS, started, operation, piece):
        assert stripes == count
        assert all(right)


@pytest.mark.parametrize("bytes", [0, 16, 100, 4096, 1_000_001])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_stripes_cover_a_piece_and_are_even(bytes: int, count: int) -> None:
    ends = striping.bounds(bytes, count)
    assert (ends[0], ends[-1]) == (0, bytes)
    lengths = np.diff(ends)
    assert lengths.max() - lengths.min() < 32  # a unit of 16, and what is less than one
    assert all(end % 16 == 0 for end in ends[:-1])


def test_stripes_count_as_the_collective_that_they_are(wishing: Wishes) -> None:
    """What is exchanged to open them comes on top, once, however often they are used."""
    wishing(told(2))
    few, many = (run_threads(RANKS, started, "all_gather", 4096, calls) for calls in (2, 7))
    for (*_, wire_of_few), (*_, wire_of_many) in zip(few, many, strict=True):
        assert wire_of_many - wire_of_few == 5 * 1000


def test_what_is_made_once_or_is_small_stays_whole(wishing: Wishes, monkeypatch: pytest.MonkeyPatch) -> None:
    wishing(told(4))
    assert [count for count, *_ in run_threads(RANKS, started, "all_gather", 4096, 1)] == [None] * RANKS
    monkeypatch.setattr(striping, "LEAST", 4096 * RANKS + 1)
    assert [count for count, *_ in run_threads(RANKS, started, "all_gather", 4096)] == [None] * RANKS


def test_nobody_opens_stripes_while_a_graph_is_captured(wishing: Wishes, monkeypatch: pytest.MonkeyPatch) -> None:
    wishing(told(4))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for count, right, *_ in run_threads(RANKS, started, "all_gather", 4096):
        assert count is None
        assert all(right)


def test_ranks_take_the_fewest_that_one_wants(wishing: Wishes) -> None:
    wishing([Wanted(4, 4, True), Wanted(3, 3, True), Wanted(2, 2, True)])
    assert [count for count, *_ in run_threads(RANKS, started, "all_to_all", 4096)] == [2] * RANKS


@pytest.mark.parametrize(("machines", "count"), [([7, 7, 7], 1), ([7, 8, 7], 3)])
def test_it_is_between_machines_that_sockets_count(wishing: Wishes, machines: list[int], count: int) -> None:
    wishing([Wanted(1, 3, False)] * RANKS, machines, faster=10.0)
    for opened, right, *_ in run_threads(RANKS, started, "all_to_all", 4096):
        assert opened == count
        assert all(right)


@pytest.mark.parametrize(("faster", "count"), [(1.1, 1), (1.5, 4)])
def test_stripes_that_nobody_asked_for_must_pay(wishing: Wishes, faster: float, count: int) -> None:
    wishing([Wanted(4, 4, False)] * RANKS, faster=faster)
    for opened, right, *_ in run_threads(RANKS, started, "all_to_all", 4096):
        assert opened == count
        assert all(right)


def test_one_rank_that_was_not_told_has_all_of_them_try(wishing: Wishes) -> None:
    wishing([Wanted(4, 4, True), Wanted(4, 4, False), Wanted(4, 4, True)], faster=0.5)
    assert [count for count, *_ in run_threads(RANKS, started, "all_to_all", 4096)] == [1] * RANKS


class Asked:
    """What `_wanted` asks of a backend."""

    rank, divisible = 1, True


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Sixteen cores of which one rank has all, and an environment that says nothing."""
    names = ("NET", "NET_PLUGIN", "IB_DISABLE", "P2P_DISABLE", "SHM_DISABLE")
    for name in (SWITCH, "LOCAL_WORLD_SIZE", *(f"NCCL_{name}" for name in names)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(striping, "cores", lambda: 16)
    monkeypatch.setattr(striping, "_by_sockets", partial(striping._by_sockets, Path("/nowhere")))
    return monkeypatch


def wanted_of(backend: Any = Asked) -> Wanted:
    return striping._wanted(backend)


def test_sockets_are_for_what_is_on_several_machines_or_may_use_nothing_else(clean: pytest.MonkeyPatch) -> None:
    assert wanted_of() == (1, 4, False)
    clean.setenv("NCCL_P2P_DISABLE", "1")
    assert wanted_of() == (1, 4, False)
    clean.setenv("NCCL_SHM_DISABLE", "1")
    assert wanted_of() == (4, 4, False)


def test_every_stripe_has_two_cores(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("LOCAL_WORLD_SIZE", "4")
    assert wanted_of() == (1, 2, False)
    clean.setenv("LOCAL_WORLD_SIZE", "32")
    assert wanted_of() == (1, 1, False)


def test_who_says_how_many_gets_them(clean: pytest.MonkeyPatch) -> None:
    clean.setenv(SWITCH, "6")
    assert wanted_of() == (6, 6, True)
    clean.setattr(Asked, "divisible", False)  # for NCCL makes no groups of these ranks
    assert wanted_of() == (1, 1, False)


@pytest.mark.parametrize("value", ["0", "-1", "many", "2.5"])
def test_no_number_of_stripes(clean: pytest.MonkeyPatch, value: str) -> None:
    clean.setenv(SWITCH, value)
    with pytest.raises(BackendError, match=rf"rank 1: {SWITCH} must be a number of stripes, such as 4 or 1, got"):
        wanted_of()


@pytest.mark.parametrize(
    ("name", "value", "by_sockets"),
    [
        ("NCCL_NET", "Socket", True),
        ("NCCL_NET", "IB", False),
        ("NCCL_NET_PLUGIN", "aws-ofi", False),
        ("NCCL_NET_PLUGIN", "none", True),
        ("NCCL_IB_DISABLE", "1", True),
    ],
)
def test_what_nccl_is_told_of_its_network(clean: pytest.MonkeyPatch, name: str, value: str, by_sockets: bool) -> None:
    clean.setenv(name, value)
    assert wanted_of().between == (4 if by_sockets else 1)


def test_a_machine_with_infiniband_does_without(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean.undo()
    clean.delenv("NCCL_NET", raising=False)
    assert striping._by_sockets(tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    assert not striping._by_sockets(tmp_path)
    clean.setenv("NCCL_IB_DISABLE", "1")
    assert striping._by_sockets(tmp_path)
