"""Ranks take the way through peers' memory all or not at all, and ask each other once; the GPU tests have the rest."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from typing import Any, cast

import pytest
import torch

from onebit.comm import Backend, peer_memory, run_threads
from onebit.comm.machine import machine
from onebit.comm.peer_memory import LARGEST, PeerCollective, PeerMemory
from onebit.comm.striping import Stripes
from onebit.comm.threads_backend import ThreadsBackend
from onebit.comm.torch_backend import TorchBackend

RANKS = 3


def asked(backend: Backend, calls: int = 2, each: int = 64) -> tuple[str | None, list[bool], int]:
    """What a rank is told, whether it got something, and how many collectives that took."""
    peers = PeerMemory(cast(TorchBackend, backend))
    backend.traffic.reset()
    got = [peers.exchange(each, 1) is not None for _ in range(calls)]
    return peers.refusal, got, backend.traffic.collectives


def rank_here() -> int:
    backend = ThreadsBackend.current()
    assert backend is not None
    return backend.rank


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has ranks refuse, fail to map memory or to have any, or be on machines as told, by rank."""

    def set_up(refusals: dict[int, str], failing: set[int], machines: list[int], without: Collection[int] = ()) -> None:
        def allocate(size: int) -> torch.Tensor:
            if rank_here() in without:
                raise RuntimeError("none left")
            return torch.zeros(size, dtype=torch.uint8)

        def make(backend: Any, *_: Any) -> object:
            if backend.rank in failing:
                raise RuntimeError("no such memory")
            return object()

        def rendezvous(memory: torch.Tensor, backend: Backend) -> Any:
            backend.barrier()  # whoever does not come keeps the others
            return types.SimpleNamespace(buffer_ptrs_dev=0)

        monkeypatch.setattr(peer_memory, "_refusal", lambda backend: refusals.get(backend.rank))
        monkeypatch.setattr(peer_memory, "_allocate", allocate)
        monkeypatch.setattr(peer_memory, "_rendezvous", rendezvous)
        monkeypatch.setattr(peer_memory, "_make_exchange", make)
        monkeypatch.setattr(peer_memory, "machine", lambda: machines[rank_here()])
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    return set_up


def test_where_all_can_all_do(capable: Callable[..., None]) -> None:
    capable({}, set(), [7] * RANKS)
    for refusal, got, _ in run_threads(RANKS, asked):
        assert refusal is None
        assert got == [True, True]


def test_one_that_refuses_is_enough_and_nobody_asks_again(capable: Callable[..., None]) -> None:
    capable({1: "told not to"}, set(), [7] * RANKS)
    told = run_threads(RANKS, asked)
    assert [refusal for refusal, _, _ in told] == ["rank 1 refused", "told not to", "rank 1 refused"]
    for _, got, collectives in told:
        assert got == [False, False]
        assert collectives == 1


def test_one_that_fails_is_enough(capable: Callable[..., None]) -> None:
    capable({}, {2}, [7] * RANKS)
    told = run_threads(RANKS, asked)
    assert told[2][0] == "symmetric memory: no such memory"
    assert [refusal for refusal, _, _ in told[:2]] == ["rank 2 refused"] * 2
    assert all(got == [False, False] for _, got, _ in told)


def test_nobody_waits_for_one_that_has_no_memory_left(capable: Callable[..., None]) -> None:
    capable({}, set(), [7] * RANKS, without={2})
    told = run_threads(RANKS, asked)
    assert [refusal for refusal, _, _ in told] == ["rank 2 refused"] * 2 + ["symmetric memory: none left"]
    for _, got, collectives in told:
        assert got == [False, False]
        assert collectives == 1


def test_several_machines_do_not(capable: Callable[..., None]) -> None:
    capable({}, set(), [7, 7, 8])
    for refusal, got, _ in run_threads(RANKS, asked):
        assert refusal == "the ranks are on several machines"
        assert got == [False, False]


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_memory_that_pytorch_keeps_for_itself_is_asked_back_once(
    capable: Callable[..., None], monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    allocate, events = peer_memory._allocate, []
    capable({}, set(), [7])

    def empty(size: int, **_: Any) -> torch.Tensor:
        events.append("empty")
        if events.count("empty") <= failures:
            raise torch.OutOfMemoryError("none left")
        return torch.ones(size, dtype=torch.uint8)

    symmetric = types.SimpleNamespace(empty=empty)
    monkeypatch.setattr(torch.distributed, "_symmetric_memory", symmetric, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    if failures == 2:
        with pytest.raises(torch.OutOfMemoryError):
            allocate(16)
    else:
        assert allocate(16).tolist() == [0] * 16
    assert events == ["empty", "emptied", "empty"][: 1 + 2 * (failures > 0)]


def test_large_ones_ask_nobody(capable: Callable[..., None]) -> None:
    capable({}, set(), [7] * RANKS)
    for _, got, collectives in run_threads(RANKS, asked, 1, LARGEST // RANKS + 1):
        assert got == [False]
        assert collectives == 0


BUFFER = 16 * RANKS * (LARGEST // (16 * RANKS) + 1)  # bytes, of which every rank sends a whole number of lines


def lent(backend: Backend, bytes: int) -> tuple[str | None, list[bool], int]:
    """What a rank is told that asks for a buffer; what is known of that, and of a part; and how many collectives."""
    peers = PeerMemory(cast(TorchBackend, backend))
    backend.traffic.reset()
    buffer = peers.buffer(bytes)
    asked = backend.traffic.collectives
    if buffer is None:
        return peers.refusal, [], asked
    assert buffer.shape == (bytes,)
    assert buffer.sum() == 0
    whole, part = peers.push_to(buffer) is not None, peers.push_to(buffer[:16]) is not None
    del buffer
    return peers.refusal, [whole, part, bool(peers._pushes)], asked


def test_a_buffer_is_known_whole_and_as_long_as_it_is_kept(capable: Callable[..., None]) -> None:
    capable({}, set(), [7] * RANKS)
    for refusal, known, _ in run_threads(RANKS, lent, BUFFER):
        assert refusal is None
        assert known == [True, False, False]


def test_one_that_refuses_leaves_all_without_a_buffer(capable: Callable[..., None]) -> None:
    capable({1: "told not to"}, set(), [7] * RANKS)
    for _, known, asked in run_threads(RANKS, lent, BUFFER):
        assert known == []
        assert asked == 1


@pytest.mark.parametrize("bytes", [LARGEST, BUFFER + 16], ids=["small", "not to be dealt"])
def test_a_buffer_that_gains_nothing_asks_nobody(capable: Callable[..., None], bytes: int) -> None:
    capable({}, set(), [7] * RANKS)
    for _, known, asked in run_threads(RANKS, lent, bytes):
        assert known == []
        assert asked == 0


def gathered(backend: Backend, in_line: bool) -> list[list[int]]:
    """What an all_gather brings that may take the other way, three times."""
    peers, stripes = PeerMemory(cast(TorchBackend, backend)), cast(Stripes, None)  # for none is large
    mine, everyone = torch.zeros(4, dtype=torch.uint8), torch.zeros(4 * RANKS, dtype=torch.uint8)
    over = cast(TorchBackend, backend)
    collective = PeerCollective(over, peers, stripes, "all_gather", everyone, mine, 4 * (RANKS - 1))
    seen = []
    for call in range(3):
        mine.fill_(10 * call + backend.rank)
        collective.start(in_line=in_line).wait()
        seen.append(everyone.view(RANKS, 4)[:, 0].tolist())
    return seen


@pytest.mark.parametrize("in_line", [True, False])
def test_without_it_the_transport_is_used(capable: Callable[..., None], in_line: bool) -> None:
    capable({0: "told not to"}, set(), [7] * RANKS)
    for seen in run_threads(RANKS, gathered, in_line):
        assert seen == [[10 * call + rank for rank in range(RANKS)] for call in range(3)]


def test_a_machine_is_told_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    assert here == machine()
    assert 0 <= here < 2**48
    monkeypatch.setenv("NCCL_HOSTID", "another")  # which is what NCCL is told then
    assert machine() != here


def test_who_gave_up_is_seen_by_the_host() -> None:
    peers = run_threads(1, lambda backend: PeerMemory(cast(TorchBackend, backend)))[0]
    assert not peers.given_up
    peers.give_up()
    assert peers.given_up
