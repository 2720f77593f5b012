"""Small collectives through peers' memory bring what NCCL brings, are used where they can be, and end without peers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import (
    Backend,
    CompressedAllreduce,
    compressed_allreduce,
    make_backend,
    peer_memory,
)
from onebit.comm.gpu.exchange import Exchange, mailbox_bytes
from onebit.comm.peer_memory import LARGEST, SWITCH, PeerCollective
from onebit.comm.torch_backend import TorchBackend
from onebit.compress import Int8Codec, SignCodec
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, normal
from tests.gpu.peer_paths import (
    LIMIT,
    OneDevice,
    check_ended,
    check_pieces,
    check_same_bits,
    check_waits_no_more,
    ended,
    random_bytes,
    two_devices,
)


class Mailboxes(OneDevice):
    """Ranks with mailboxes for pieces of so many bytes."""

    def __init__(self, ranks: int, bytes: int, pieces: int) -> None:
        super().__init__(ranks, mailbox_bytes(bytes, ranks))
        self.exchanges = [
            Exchange(self.where, rank, ranks, bytes, pieces, self.given_up[rank], self.device) for rank in range(ranks)
        ]

    def run(self, outputs: list[Tensor], inputs: list[Tensor], taking_part: list[int], limit: float = 20.0) -> None:
        self.each(lambda rank: self.exchanges[rank](outputs[rank], inputs[rank], limit), taking_part)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("bytes", [1, 16, 4096, 5000, 33792, 262144])
@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("one_for_each", [True, False])
def test_every_rank_gets_a_piece_of_every_rank(ranks: int, bytes: int, skew: int, one_for_each: bool) -> None:
    pieces = ranks if one_for_each else 1
    device = Mailboxes(ranks, bytes, pieces)
    torch.cuda.synchronize()
    for call in range(5):  # both places of the mailbox, again and again
        inputs, outputs = random_bytes(ranks, pieces * bytes, skew), random_bytes(ranks, ranks * bytes, skew)
        torch.cuda.synchronize()
        order = [(rank + call) % ranks for rank in range(ranks)]
        device.run(outputs, inputs, order)
        torch.cuda.synchronize()
        check_pieces(outputs, inputs, bytes, one_for_each, f"call {call}")
        assert not any(int(flag) for flag in device.given_up)


def test_calls_may_run_one_ahead() -> None:
    """Nothing but the kernels themselves keeps a rank from overtaking another."""
    ranks, bytes, calls = 3, 33792, 40
    device = Mailboxes(ranks, bytes, ranks)
    inputs = [random_bytes(ranks, ranks * bytes, 0) for _ in range(calls)]
    outputs = [random_bytes(ranks, ranks * bytes, 0) for _ in range(calls)]
    torch.cuda.synchronize()
    for call in range(calls):
        device.run(outputs[call], inputs[call], [(rank + call) % ranks for rank in range(ranks)])
        with torch.cuda.stream(device.streams[call % ranks]):
            torch.cuda._sleep(200_000)  # this rank is late for the next
    torch.cuda.synchronize()
    for call in range(calls):
        check_pieces(outputs[call], inputs[call], bytes, True, f"call {call}")


def test_who_waits_in_vain_says_nan_and_waits_no_more() -> None:
    device = Mailboxes(3, 4096, 3)
    inputs, outputs = random_bytes(3, 3 * 4096, 0), random_bytes(3, 3 * 4096, 0)
    torch.cuda.synchronize()
    start = time.monotonic()
    device.run(outputs, inputs, [0, 1], LIMIT)
    torch.cuda.synchronize()
    took = time.monotonic() - start
    assert LIMIT * 0.9 < took < 20 * LIMIT
    for rank in (0, 1):
        assert int(device.given_up[rank]) == 1
        here, missing = outputs[rank].split([2 * 4096, 4096])
        assert torch.equal(here, torch.cat([x[rank * 4096 :][:4096] for x in inputs[:2]]))
        assert bool((missing == 255).all())
    check_waits_no_more(lambda limit: device.run(outputs, inputs, [0, 1], limit))


def averages(backend: Backend) -> list[list[bytes]]:
    """What small averages of several codecs give, call after call."""
    device = "cuda" if backend.name == "nccl" else "cpu"
    seen = []
    for codec in (SignCodec(), SignCodec(block_size=64), Int8Codec()):
        for numel in (1, 3000, 400_000):
            x = torch.empty(numel, device=device)
            reduce = CompressedAllreduce(x, backend, codec)
            for call in range(4):
                x.copy_(normal(backend.rank, call, numel=numel))
                reduce(x)
                seen.append(bits([x]))
    return seen


def refusal_of(backend: Backend) -> str | None:
    assert isinstance(backend, TorchBackend)
    assert backend.peers is not None
    return backend.peers.refusal


def check_bits(backend: Backend) -> tuple[list[list[bytes]], str | None]:
    return averages(backend), refusal_of(backend)


@two_devices
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_averages_have_the_bits_that_they_have_elsewhere(ranks: int) -> None:
    by_peers, by_nccl = check_same_bits(ranks, check_bits, averages)
    assert by_peers == [None] * ranks, f"peers' memory was not used: {by_peers}"
    assert by_nccl == [f"{SWITCH}=0"] + ["rank 0 refused"] * (ranks - 1)


def check_graphs(backend: Backend) -> list[int]:
    """Two averages, captured and replayed on streams of their own, and one called between; counts what differs."""
    wrong = []
    given = normal(backend.rank, numel=100_000).cuda()
    xs = [torch.zeros_like(given) for _ in range(3)]
    reduces = [CompressedAllreduce(x, backend) for x in xs]
    plain = run_plain(backend, given)
    graphs = []
    for x, reduce in zip(xs[:2], reduces[:2], strict=True):
        for _ in range(2):  # the second maps memory, which a capture cannot
            reduce(x)
        reduce.residual.reset()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            reduce(x)
        reduce.residual.reset()
    reduces[2](xs[2])
    reduces[2].residual.reset()
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for x, graph, stream in zip(xs, graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                x.copy_(given)
                graph.replay()
        xs[2].copy_(given)
        reduces[2](xs[2])
        torch.cuda.synchronize()
        expected = plain()
        wrong += [int((x != expected).sum()) for x in xs]
    return wrong


def run_plain(backend: Backend, given: Tensor) -> Callable[[], Tensor]:
    reduce = CompressedAllreduce(given, backend)

    def run() -> Tensor:
        x = given.clone()
        reduce.start(x).wait()  # beside the stream, and small, so by NCCL
        return x

    return run


@two_devices
def test_graphs_and_calls_on_several_streams_do_not_disturb_each_other() -> None:
    for wrong in run_ranks("nccl", 2, check_graphs):
        assert wrong == [0] * len(wrong)


def check_single_calls(backend: Backend) -> int:
    """How often averages that are made for a single call have mapped memory."""
    made = 0
    make = peer_memory._make_exchange

    def counted(*args: Any) -> Exchange:
        nonlocal made
        made += 1
        return make(*args)

    peer_memory._make_exchange = counted
    x = normal(backend.rank, numel=100_000).cuda()
    for _ in range(4):
        compressed_allreduce(x, backend=backend)
    torch.cuda.synchronize()
    return made


@two_devices
def test_what_is_made_for_one_call_maps_nothing() -> None:
    assert run_ranks("nccl", 2, check_single_calls) == [0, 0]


def check_memory(backend: Backend) -> list[int]:
    """How many pieces of memory wait to be freed after each of several averages has come and gone."""
    waiting = []
    for _ in range(6):
        x = normal(backend.rank, numel=100_000).cuda()
        reduce = CompressedAllreduce(x, backend)
        for _ in range(2):
            reduce(x)
        del reduce
        gc.collect()
        waiting.append(len(peer_memory._retired))
    return waiting


@two_devices
def test_memory_of_averages_that_are_gone_is_freed_when_the_next_is_made() -> None:
    for waiting in run_ranks("nccl", 2, check_memory):
        assert waiting == [2] * 6, waiting  # those of the two collectives of the last


def check_timeout(_: Backend) -> tuple[bool, str, float]:
    backend = make_backend(torch.distributed.new_group(backend="nccl"), timeout=60.0)
    x = normal(backend.rank).cuda()
    reduce = CompressedAllreduce(x, backend)
    for _ in range(2):
        reduce(x)
    torch.cuda.synchronize()
    backend.timeout = LIMIT
    if backend.rank == 1:
        time.sleep(10 * LIMIT)
        return True, "", 0.0
    return ended(lambda: reduce(x), x)


@two_devices
def test_without_a_peer_the_mean_is_nan_and_the_next_use_raises() -> None:
    check_ended(*run_ranks("nccl", 2, check_timeout)[0])


def check_large(backend: Backend) -> list[tuple[bool, bool]]:
    """Whether averages, of more and of less than the limit, send their payloads by the kernel for small pieces."""
    used = []
    for numel in (16 * LARGEST, LARGEST):
        x = normal(backend.rank, numel=numel).cuda()
        reduce = CompressedAllreduce(x, backend)
        for _ in range(2):
            reduce(x)
        collective = reduce._buckets[0]._all_to_all
        assert isinstance(collective, PeerCollective)
        used.append((collective._exchange is not None, collective._push is not None))
    return used


@two_devices
def test_large_pieces_take_the_way_for_large_pieces() -> None:
    assert run_ranks("nccl", 2, check_large) == [[(False, True), (True, False)]] * 2
