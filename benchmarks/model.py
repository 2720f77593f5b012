"""A model of averages: seconds from latency, bandwidth and compute, for any number of ranks, on paper.

    plain      (all_reduce of float32)      2·⌈log₂ n⌉ messages + 8·N·(n - 1)/n bytes
    compressed (all_to_all, all_gather)     per bucket one call and 2·(n - 1) messages; 2·(n - 1) payloads of a chunk;
                                            encode and decode of N elements, reduce_encode of a chunk
    two-level  (`local_group=`)             float32 within a host, compressed between hosts, a part for each rank

Bytes and kernels of different buckets run at the same time: the longer of the two counts, and of the shorter what one
bucket has of it. Plain messages are those of a tree, the fewest there can be, so large groups do not flatter us.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK = 1024  # elements that share one scale
BLOCK_BYTES = BLOCK // 8 + 4
FRAME = 1514 / 1448  # bytes of an Ethernet frame per byte of TCP's payload


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a rank's machine takes, in seconds.

    Attributes:
        message: to send or receive one message.
        call: to start a compressed average of one bucket and to end it.
        byte: per byte that the transport moves and adds, where no wire is slower.
        element: per element, to encode and decode it.
        served: per element of a rank's own chunk, to average and encode it.
        payload: per element of a rank's own chunk and rank, to read its payload.
        share: ranks per processor, at least 1; all of the above take so many times as long.
        ahead: calls are made while a device still works at what came before, so only the longer of both counts.
    """

    message: float
    call: float
    byte: float
    element: float
    served: float
    payload: float = 0.0
    share: float = 1.0
    ahead: bool = False


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A link of each host, as fast both ways.

    Attributes:
        rate: bytes per second, of frames.
        latency: seconds until a message arrives.
        burst: bytes that pass at once before the rate holds, as with a token bucket.
    """

    rate: float = math.inf
    latency: float = 0.0
    burst: float = 0.0

    def seconds(self, nbytes: float) -> float:
        """Of `nbytes` of payload."""
        return max(0.0, nbytes * FRAME - self.burst) / self.rate


def plain_bytes(ranks: int, numel: int) -> float:
    """What a rank sends to average float32 numbers as they are."""
    return 8.0 * numel * (ranks - 1) / ranks


def compressed_bytes(ranks: int, numel: int) -> float:
    """What a rank sends in both phases: a payload of a chunk, which is one block at least, to and from each other."""
    return 2.0 * (ranks - 1) * math.ceil(numel / (BLOCK * ranks)) * BLOCK_BYTES


def plain(host: Host, wire: Wire, ranks: int, numel: int) -> float:
    """Seconds of the transport's own average."""
    messages = 2 * math.ceil(math.log2(ranks))
    nbytes = plain_bytes(ranks, numel)
    moved = max(host.share * host.byte * nbytes, wire.seconds(nbytes))
    return messages * (host.share * host.message + wire.latency) + moved


def compressed(host: Host, wire: Wire, ranks: int, numel: int, bucket: int = 1 << 22) -> float:
    """Seconds of `CompressedAllreduce`.

    bucket: elements that travel together.
    """
    buckets = math.ceil(numel / bucket)
    calls, messages = buckets * host.call, buckets * 2 * (ranks - 1) * host.message
    nbytes = compressed_bytes(ranks, numel)
    moved = max(host.share * host.byte * nbytes, wire.seconds(nbytes))
    kernels = host.share * (host.element * numel + host.served * numel / ranks + host.payload * numel)
    longer, shorter = max(moved, kernels), min(moved, kernels)
    rest = host.share * messages + 2 * wire.latency + longer + shorter / buckets
    return max(host.share * calls, rest) if host.ahead else host.share * calls + rest


def two_level(
    host: Host, local: Wire, wire: Wire, ranks: int, numel: int, on_host: int, bucket: int = 1 << 22
) -> float:
    """Seconds of an average that is plain among the `on_host` ranks of a host and compressed between hosts.

    Each local rank has one part of the tensor, sums it over its host and averages it with its like on other hosts; the
    ranks of a host share its wire.
    """
    hosts, part = ranks // on_host, math.ceil(numel / on_host)
    within = plain(host, local, on_host, numel)
    if hosts == 1:
        return within
    shared = Wire(rate=wire.rate / on_host, latency=wire.latency, burst=wire.burst / on_host)
    return within + compressed(host, shared, hosts, part, bucket)
