"""Large collectives write straight to where others want it: they bring what NCCL brings, and end without peers."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, make_backend, peer_memory, run_threads
from onebit.comm.gpu.push import UNIT, Push, memory_bytes
from onebit.comm.peer_memory import PeerCollective
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

PIECES = [UNIT, 5 * UNIT, 33_792, 1_000_016]  # bytes: one unit, few, a small payload, more than a block moves at once


class Buffers(OneDevice):
    """Ranks with outputs for pieces of so many bytes, and signals."""

    def __init__(self, ranks: int, piece: int) -> None:
        bytes = ranks * piece
        super().__init__(ranks, memory_bytes(bytes))
        self.outputs = [memory[:bytes] for memory in self.memories]
        self.pushes = [Push(self.where, rank, ranks, bytes, self.given_up[rank], self.device) for rank in range(ranks)]

    def run(self, inputs: list[Tensor], taking_part: list[int], limit: float = 20.0, current: bool = True) -> None:
        def push(rank: int) -> None:
            self.pushes[rank](inputs[rank], limit, None if current else self.streams[rank])

        self.each(push, taking_part)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("one_for_each", [True, False])
def test_every_rank_gets_a_piece_of_every_rank(ranks: int, piece: int, one_for_each: bool) -> None:
    device = Buffers(ranks, piece)
    for call in range(6):
        inputs = random_bytes(ranks, ranks * piece if one_for_each else piece)
        torch.cuda.synchronize()
        device.run(inputs, [(rank + call) % ranks for rank in range(ranks)], current=call % 3 > 0)
        torch.cuda.synchronize()
        check_pieces(device.outputs, inputs, piece, one_for_each, f"call {call}")
        assert not any(int(flag) for flag in device.given_up)


def test_nobody_writes_to_an_output_that_is_still_read() -> None:
    """Every rank copies its output, at its own pace, before it starts the next."""
    ranks, piece, calls = 3, 33_792, 30
    device = Buffers(ranks, piece)
    inputs = [random_bytes(ranks, ranks * piece) for _ in range(calls)]
    seen = [random_bytes(ranks, ranks * piece) for _ in range(calls)]
    torch.cuda.synchronize()
    for call in range(calls):
        device.run(inputs[call], [(rank + call) % ranks for rank in range(ranks)])
        for rank, stream in enumerate(device.streams):
            with torch.cuda.stream(stream):
                if rank == call % ranks:
                    torch.cuda._sleep(300_000)  # this rank reads late
                seen[call][rank].copy_(device.outputs[rank])
    torch.cuda.synchronize()
    for call in range(calls):
        check_pieces(seen[call], inputs[call], piece, True, f"call {call}")


def test_who_waits_in_vain_says_nan_and_waits_no_more() -> None:
    piece = 1_000_016
    device = Buffers(3, piece)
    inputs = random_bytes(3, 3 * piece)
    torch.cuda.synchronize()
    start = time.monotonic()
    device.run(inputs, [0, 1], LIMIT)
    torch.cuda.synchronize()
    assert LIMIT * 0.9 < time.monotonic() - start < 20 * LIMIT
    for rank in (0, 1):
        assert int(device.given_up[rank]) == 1
        assert bool((device.outputs[rank] == 255).all())
    assert bool((device.outputs[2] == 0).all()), "nothing is written to a rank that has not said it may be"
    check_waits_no_more(lambda limit: device.run(inputs, [0, 1], limit))


def test_nobody_writes_to_who_has_given_up() -> None:
    piece = 33_792
    device = Buffers(2, piece)
    inputs = random_bytes(2, 2 * piece)
    torch.cuda.synchronize()
    device.run(inputs, [0], LIMIT)
    torch.cuda.synchronize()
    device.outputs[0].fill_(7)
    torch.cuda.synchronize()
    start = time.monotonic()
    device.run(inputs, [1], 60.0)  # late, but before its own limit
    torch.cuda.synchronize()
    assert time.monotonic() - start < 10.0
    assert bool((device.outputs[0] == 7).all())
    assert int(device.given_up[1]) == 1
    assert bool((device.outputs[1] == 255).all())


def all_large() -> None:
    """Have payloads of any size written straight to where they are wanted; for processes of their own."""
    peer_memory.LARGEST = 0


def averages(backend: Backend) -> list[list[bytes]]:
    """What averages of several codecs give, call after call, in one bucket or several, waited for at once or not."""
    device = "cuda" if backend.name == "nccl" else "cpu"
    seen = []
    for codec in (SignCodec(), SignCodec(block_size=64), Int8Codec()):
        for numel, bucket_mb in ((1, None), (3000, None), (400_000, None), (400_000, 0.25)):
            x = torch.empty(numel, device=device)
            reduce = CompressedAllreduce(x, backend, codec, bucket_mb=bucket_mb)
            for call in range(4):
                x.copy_(normal(backend.rank, call, numel=numel))
                reduce.start(x, overlap=call % 2 > 0).wait()
                seen.append(bits([x]))
    return seen


def uses(reduce: CompressedAllreduce) -> list[bool]:
    """Whether either collective of the first bucket writes straight to where it is wanted."""
    bucket = reduce._buckets[0]
    collectives = (bucket._all_to_all, bucket._all_gather)
    return [isinstance(c, PeerCollective) and c._push is not None for c in collectives]


def check_bits(backend: Backend) -> tuple[list[list[bytes]], list[bool]]:
    all_large()
    return averages(backend), uses(CompressedAllreduce(torch.zeros(1000, device="cuda"), backend))


@two_devices
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_averages_have_the_bits_that_they_have_elsewhere(ranks: int) -> None:
    by_peers, by_nccl = check_same_bits(ranks, check_bits, averages)
    assert by_peers == [[True, True]] * ranks
    assert by_nccl == [[False, False]] * ranks


def check_levels(backend: Backend) -> list[list[bytes]]:
    """Averages on two levels, of nodes of one rank, so that all that is between nodes is all there is."""
    if backend.name == "nccl":
        all_large()
    device = "cuda" if backend.name == "nccl" else "cpu"
    x = torch.empty(400_000, device=device)
    reduce = CompressedAllreduce(x, backend, local_group=1)
    seen = []
    for call in range(3):
        x.copy_(normal(backend.rank, call, numel=x.numel()))
        reduce(x)
        seen.append(bits([x]))
    return seen


@two_devices
def test_between_nodes_the_bits_are_the_same() -> None:
    assert run_ranks("nccl", 2, check_levels) == run_threads(2, check_levels)


def check_graphs(backend: Backend) -> list[int]:
    """Averages of one bucket and of several, captured and replayed, and one called between; counts what differs."""
    all_large()
    given = normal(backend.rank, numel=100_000).cuda()
    xs = [torch.zeros_like(given) for _ in range(3)]
    reduces = [CompressedAllreduce(x, backend, bucket_mb=mb) for x, mb in zip(xs, (None, 0.1, None), strict=True)]
    expected_by = CompressedAllreduce(given, backend)
    graphs = []
    for x, reduce in zip(xs[:2], reduces[:2], strict=True):
        reduce(x)
        reduce.residual.reset()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            reduce(x)
        reduce.residual.reset()
    torch.cuda.synchronize()
    wrong = []
    for _ in range(20):
        for x, graph in zip(xs, graphs, strict=False):
            x.copy_(given)
            graph.replay()
        xs[2].copy_(given)
        reduces[2](xs[2])
        expected = given.clone()
        expected_by(expected)
        torch.cuda.synchronize()
        wrong += [int((x != expected).sum()) for x in xs]
    return wrong


@two_devices
def test_graphs_and_calls_do_not_disturb_each_other() -> None:
    for wrong in run_ranks("nccl", 2, check_graphs):
        assert wrong == [0] * len(wrong)


def check_memory(backend: Backend) -> list[tuple[int, int]]:
    """How many pieces of memory are in use, and wait to be freed, after each of several averages has come and gone."""
    all_large()
    assert isinstance(backend, TorchBackend)
    assert backend.peers is not None
    waiting = []
    for _ in range(4):
        x = normal(backend.rank, numel=100_000).cuda()
        reduce = CompressedAllreduce(x, backend)
        reduce(x)
        del reduce
        gc.collect()
        waiting.append((len(backend.peers._pushes), len(peer_memory._retired)))
    return waiting


@two_devices
def test_memory_of_averages_that_are_gone_is_freed_when_the_next_is_made() -> None:
    for waiting in run_ranks("nccl", 2, check_memory):
        assert waiting == [(0, 2)] * 4, waiting


def check_timeout(_: Backend, overlap: bool) -> tuple[bool, str, float]:
    all_large()
    backend = make_backend(torch.distributed.new_group(backend="nccl"), timeout=60.0)
    x = normal(backend.rank).cuda()
    reduce = CompressedAllreduce(x, backend)
    reduce(x)
    torch.cuda.synchronize()
    backend.timeout = LIMIT
    if backend.rank == 1:
        time.sleep(10 * LIMIT)
        return True, "", 0.0
    return ended(lambda: reduce.start(x, overlap=overlap).wait(), x)


@two_devices
@pytest.mark.parametrize("overlap", [False, True])
def test_without_a_peer_the_mean_is_nan_and_the_next_use_raises(overlap: bool) -> None:
    check_ended(*run_ranks("nccl", 2, check_timeout, overlap)[0])
