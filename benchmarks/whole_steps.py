"""Compressed steps with their communication, beside torch's fused AdamW alone and with NCCL's average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from onebit.benchmarks.gpu_timing import CODEC, against, make_row, timed
from onebit.benchmarks.row import Row
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam

Shapes = Sequence[tuple[int, ...]]

INTERVAL = 16  # local steps of ZeroOneAdam from one meeting of the ranks to the next
STEPS = 5  # compressed ones that fused and plain operations are compared after
# A sum that is rounded otherwise can change the sign of an entry near 0: one in some 10^7 a step, which then moves the
# other way by as much as its neighbours. One such entry of the million compared is a distance of 2e-3.
FAR = 1e-2


def whole_steps(suffix: str, shapes: Shapes, device: torch.device, rounds: int) -> tuple[list[Row], dict[str, object]]:
    """The rows of one list of parameters, and what OnebitAdam holds and takes for them, in bytes per parameter."""
    params, flat = _problem(shapes, device)
    numel, ranks = flat.numel(), dist.get_world_size()
    base = torch.cuda.memory_allocated()
    ours = OnebitAdam(params, lr=1e-4, freeze_step=1)
    for _ in range(4):  # warm-up, and the last steps that allocate
        ours.step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    ours.step()
    torch.cuda.synchronize()
    temporary = torch.cuda.max_memory_allocated() - base - held
    packed = CODEC.plan([p.numel() for p in params], ranks)[0].payload_bytes * ranks
    distance = _distance_from_plain(device)
    memory = {
        "held": held / numel,
        "held without payloads under way": (held - (3 + 1 / ranks) * packed) / numel,
        "temporary": temporary / numel,
        "bar": 8.2 + 4 / ranks,
        "kernels": ours.kernels,
        "distance from plain operations": distance,
    }
    moved = int(24 * numel + 4 * packed + (8 * numel + (ranks + 1) * packed) / ranks)
    times = timed(ours.step, rounds)
    wrong = _differing_between_ranks(params) + int(distance > FAR)
    rows = [make_row(f"OnebitAdam{suffix}", torch.float32, numel, moved, times, wrong)]
    del ours
    others = _others(suffix, params, rounds)

    theirs = torch.optim.AdamW(params, lr=1e-4, fused=True)
    alone = make_row(f"AdamW(fused=True){suffix}", torch.float32, numel, 28 * numel, timed(theirs.step, rounds), None)
    rows.append(alone)
    for dtype in (torch.float32, torch.bfloat16):
        sent = flat.to(dtype)

        def averaged_step(sent: Tensor = sent) -> None:
            dist.all_reduce(sent, op=dist.ReduceOp.AVG)
            theirs.step()

        name = f"AdamW(fused=True) + NCCL {str(dtype).removeprefix('torch.')}{suffix}"
        wire = 2 * (ranks - 1) * numel * dtype.itemsize // ranks
        rows.append(make_row(name, torch.float32, numel, 28 * numel, timed(averaged_step, rounds), None, wire))
    for other, role in zip(rows[1:], ("AdamW", "AdamW + NCCL fp32", "AdamW + NCCL bf16"), strict=True):
        rows[0].ratios.update(against(role, rows[0], other, by_time=True))
    for other in others:
        other.ratios.update(against("OnebitAdam", other, rows[0], by_time=True))
    return rows + others, memory


def _others(suffix: str, params: Sequence[torch.nn.Parameter], rounds: int) -> list[Row]:
    """Mean steps of a whole interval of ZeroOneAdam, most of them local, and steps of OnebitLamb."""
    numel = sum(p.numel() for p in params)
    local = ZeroOneAdam(params, lr=1e-4, var_freeze_step=2, local_step_scaler=2, local_step_clipper=INTERVAL)
    for _ in range(4 * INTERVAL):  # past the freeze, and to intervals that grow no more
        local.step()
    times = timed(local.step, rounds, INTERVAL)
    local.synchronize()
    wrong = _differing_between_ranks(params)
    rows = [make_row(f"ZeroOneAdam{suffix}", torch.float32, numel, 4 * numel, times, wrong)]
    del local
    lamb = OnebitLamb(params, lr=1e-4, freeze_step=2)
    for _ in range(5):
        lamb.step()
    times = timed(lamb.step, rounds)
    wrong = _differing_between_ranks(params)
    return [*rows, make_row(f"OnebitLamb{suffix}", torch.float32, numel, 4 * numel, times, wrong)]


def _problem(shapes: Shapes, device: torch.device) -> tuple[list[torch.nn.Parameter], Tensor]:
    """Parameters, the same on every rank, and a tensor whose pieces are their gradients, this rank's own."""
    generator = torch.Generator(device).manual_seed(1)
    params = [torch.nn.Parameter(0.02 * torch.randn(s, device=device, generator=generator)) for s in shapes]
    generator.manual_seed(2 + dist.get_rank())
    flat = torch.randn(sum(p.numel() for p in params), device=device, generator=generator)
    for p, piece in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
        p.grad = piece.view_as(p)
    return params, flat


def _differing_between_ranks(params: Sequence[Tensor]) -> int:
    """Elements that are not the same bits on all ranks."""
    count = 0
    for p in params:
        low, high = (p.detach().view(torch.int32).clone() for _ in range(2))
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        count += int((low != high).sum())
    return count


def _distance_from_plain(device: torch.device) -> float:
    """How far the fused steps end from the same steps by plain torch operations, relative to the way made."""
    ends = []
    for codec in (SignCodec(), SignCodec(kernels="reference")):
        params, flat = _problem([(1 << 20,), (1000, 77), (5,), (333,)], device)
        start = torch.cat([p.detach().reshape(-1) for p in params])
        optimizer = OnebitAdam(params, lr=1e-4, freeze_step=2, codec=codec)
        generator = torch.Generator(device).manual_seed(100 + dist.get_rank())
        for _ in range(2 + STEPS):
            flat.normal_(generator=generator)
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in params]))
    return float((ends[0] - ends[1]).norm() / (ends[1] - start).norm())
