"""How long the host takes to start an average over NCCL, piece by piece: what bounds the time of a small one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from onebit.comm import CompressedAllreduce
from onebit.comm.tensors import as_list, check_same

CALLS = 20  # between synchronisations, so that the device's queue of launches is never full
ROUNDS = 20


def host_microseconds(x: Tensor) -> dict[str, float]:
    """Mean host time in µs per call of the averages of `x`, of the stages of ours, and of what they are made of."""
    average = CompressedAllreduce(x)
    times = {
        "NCCL all_reduce": _mean(lambda: dist.all_reduce(x)),
        "compressed average": _mean(lambda: average(x)),
        "compressed average, overlapped": _mean(lambda: average.start(x).wait()),
    }
    average.stats.reset()
    _mean(lambda: average(x))
    stages = {name: 1e6 * seconds / average.stats.calls for name, seconds in average.stats.seconds.items()}
    times |= {f"of it {name}": spent for name, spent in stages.items()}
    return times | _pieces(average, x)


def _pieces(average: CompressedAllreduce, x: Tensor) -> dict[str, float]:
    (part,) = average.parts
    operators, backend = average.codec.unchecked(x.device), average.backend
    received, mine = torch.empty_like(part.sent), part.sent[: part.layout.payload_bytes].clone()
    received_rows = received.view(backend.size, -1)
    server = torch.zeros(part.layout.chunk_numel, device=x.device)
    transport: Any = dist.group.WORLD._get_backend(x.device)  # type: ignore[union-attr]
    pieces: dict[str, Callable[[], object]] = {
        "check": lambda: check_same(0, as_list(x), average._like),
        "encode": lambda: operators.encode([x], part.residual, part.mask, part.sent, part.layout),
        "reduce_encode": lambda: operators.reduce_encode(received_rows, server, part.mask, mine, part.layout, 0),
        "decode": lambda: operators.decode(part.gathered, part.mask, [x], part.layout),
        "all_finite": lambda: operators.all_finite([part.gathered], [part.layout]),
        "all_to_all in line": lambda: backend.prepare_all_to_all(received, part.sent).start(in_line=True).wait(),
        "all_to_all beside": lambda: backend.all_to_all(received, part.sent).wait(),
        "all_to_all of torch.distributed": lambda: dist.all_to_all_single(received, part.sent),
        "all_to_all of the group's half": lambda: transport.alltoall_base(received, part.sent, [], []).wait(),
        "all_gather in line": lambda: backend.prepare_all_gather(received, mine).start(in_line=True).wait(),
        "all_gather of torch.distributed": lambda: dist.all_gather_into_tensor(received, mine),
        "an elementwise operator of torch": lambda: x.mul_(1.0),
    }
    return {f"alone {name}": _mean(run) for name, run in pieces.items()}


def _mean(run: Callable[[], object]) -> float:
    """Mean µs until `run` returns; the device is idle at the start of every few calls."""
    for _ in range(2):  # the second start of a collective maps memory of peers, which takes milliseconds
        run()
    spent = 0.0
    for _ in range(ROUNDS):
        dist.barrier()
        torch.cuda.synchronize()
        since = time.perf_counter()
        for _ in range(CALLS):
            run()
        spent += time.perf_counter() - since
    torch.cuda.synchronize()
    return 1e6 * spent / (ROUNDS * CALLS)
