"""Compressed steps with their communication, beside torch's fused AdamW alone and with NCCL's average."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from onebit.benchmarks.gpu_timing import CODEC, LAUNCHES, against, differing, make_row, timed
from onebit.benchmarks.row import Row
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam

Shapes = Sequence[tuple[int, ...]]
Figures = dict[str, Any]

INTERVAL = 16  # local steps of ZeroOneAdam from one meeting of the ranks to the next
COMPARED = ((1 << 20,), (1000, 77), (5,), (333,))  # what fused and plain operations are compared on
STEPS = 5  # compressed ones that they are compared after
# A sum that is rounded otherwise can change the sign of an entry near 0: one in some 10^7 a step, which then moves the
# other way by as much as its neighbours. One such entry of the million compared is a distance of 2e-3.
FAR = 1e-2


def whole_steps(
    suffix: str, shapes: Shapes, device: torch.device, rounds: int, per_node: int = 1
) -> tuple[list[Row], Figures]:
    """The rows of one list of parameters, and what OnebitAdam holds and takes for them, in bytes per parameter.

    per_node: neighbouring ranks of a node; where that makes several nodes of several ranks, steps on two levels are
        measured as well, with state that is replicated and with state that is sharded.
    """
    start = partial(_Problem.of, suffix, shapes, device, rounds)
    row, figures = _one_level(start())
    ours = [row]
    if 1 < per_node < dist.get_world_size():
        end = None
        for shard in (False, True):
            way = f"nodes of {per_node}" + ", sharded" * shard
            row, figures[way], end = _two_levels(start(), way, per_node, shard, end)
            ours.append(row)
    theirs = _adamw(start())
    others = [_zero_one_adam(start()), _lamb(start())]
    for row in ours:
        for role, other in theirs.items():
            row.ratios.update(against(role, row, other, by_time=True))
    for row in (*ours, *others):
        row.ratios.update(against("OnebitAdam", row, ours[0], by_time=True))
    return [*ours, *theirs.values(), *others], figures


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Parameters with gradients, and how steps on them are timed.

    Attributes:
        params: the same on every rank.
        flat: what their gradients are pieces of, this rank's own.
        suffix: what names of rows say of them.
    """

    params: Sequence[torch.nn.Parameter]
    flat: Tensor
    suffix: str
    rounds: int

    @staticmethod
    def of(suffix: str, shapes: Shapes, device: torch.device, rounds: int) -> _Problem:
        """The same whenever it is made."""
        generator = torch.Generator(device).manual_seed(1)
        params = [torch.nn.Parameter(0.02 * torch.randn(s, device=device, generator=generator)) for s in shapes]
        generator.manual_seed(2 + dist.get_rank())
        flat = torch.randn(sum(p.numel() for p in params), device=device, generator=generator)
        for p, piece in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
            p.grad = piece.view_as(p)
        return _Problem(params=params, flat=flat, suffix=suffix, rounds=rounds)

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return self.flat.numel()

    def values(self) -> Tensor:
        """(numel,) A copy of all parameters."""
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def row(
        self,
        case: str,
        step: Callable[[], object],
        moved: int,
        check: Callable[[], int] | None = None,
        *,
        wire: int = 0,
        launches: int = LAUNCHES,
    ) -> Row:
        """Time a step that moves so many bytes, and then count what is wrong."""
        times = timed(step, self.rounds, launches)
        wrong = None if check is None else check()
        return make_row(case, torch.float32, self.numel, moved, times, wrong, wire)


def _one_level(problem: _Problem) -> tuple[Row, Figures]:
    numel, ranks = problem.numel, dist.get_world_size()
    ours, figures = _warmed_up(problem)
    packed = CODEC.plan([p.numel() for p in problem.params], ranks)[0].payload_bytes * ranks
    distance = _distance_from_plain(problem.flat.device)
    held = figures["held"]
    figures |= {
        "held without payloads under way": held - (3 + 1 / ranks) * packed / numel,
        "bar": 8.2 + 4 / ranks,
        "distance from plain operations": distance,
    }
    moved = int(24 * numel + 4 * packed + (8 * numel + (ranks + 1) * packed) / ranks)

    def wrong() -> int:
        return _differing_between_ranks(problem.params) + int(distance > FAR)

    return problem.row(f"OnebitAdam{problem.suffix}", ours.step, moved, wrong), figures


def _two_levels(
    problem: _Problem, way: str, per_node: int, shard: bool, expected: Tensor | None
) -> tuple[Row, Figures, Tensor]:
    """The row, the figures, and where the parameters end after as many steps as are timed, which `expected` says."""
    ours, figures = _warmed_up(problem, local_group=per_node, shard=shard)

    def wrong() -> int:
        count = _differing_between_ranks(problem.params)
        return (
            count if expected is None else count + _over_ranks(differing(problem.values(), expected), expected.device)
        )

    row = problem.row(f"OnebitAdam{problem.suffix}, {way}", ours.step, 4 * problem.numel, wrong)
    return row, figures, problem.values()


def _warmed_up(problem: _Problem, **options: Any) -> tuple[OnebitAdam, Figures]:
    """OnebitAdam that makes compressed steps, and the memory that it holds and takes."""
    gc.collect()
    base = torch.cuda.memory_allocated()
    ours = OnebitAdam(problem.params, lr=1e-4, freeze_step=1, **options)
    for _ in range(4):  # warm-up, and the last steps that allocate
        ours.step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    ours.step()
    torch.cuda.synchronize()
    temporary = torch.cuda.max_memory_allocated() - base - held
    return ours, {"held": held / problem.numel, "temporary": temporary / problem.numel, "kernels": ours.kernels}


def _adamw(problem: _Problem) -> dict[str, Row]:
    """Rows of AdamW alone and with NCCL's average, by the role that they have for others."""
    theirs = torch.optim.AdamW(problem.params, lr=1e-4, fused=True)
    name, moved, ranks = "AdamW(fused=True)", 28 * problem.numel, dist.get_world_size()
    rows = {"AdamW": problem.row(f"{name}{problem.suffix}", theirs.step, moved)}
    for role, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        sent = problem.flat.to(dtype)

        def averaged_step(sent: Tensor = sent) -> None:
            dist.all_reduce(sent, op=dist.ReduceOp.AVG)
            theirs.step()

        case = f"{name} + NCCL {str(dtype).removeprefix('torch.')}{problem.suffix}"
        wire = 2 * (ranks - 1) * problem.numel * dtype.itemsize // ranks
        rows[f"AdamW + NCCL {role}"] = problem.row(case, averaged_step, moved, wire=wire)
    return rows


def _zero_one_adam(problem: _Problem) -> Row:
    """Mean steps of a whole interval, most of them local."""
    local = ZeroOneAdam(problem.params, lr=1e-4, var_freeze_step=2, local_step_scaler=2, local_step_clipper=INTERVAL)
    for _ in range(4 * INTERVAL):  # past the freeze, and to intervals that grow no more
        local.step()

    def wrong() -> int:
        local.synchronize()
        return _differing_between_ranks(problem.params)

    return problem.row(f"ZeroOneAdam{problem.suffix}", local.step, 4 * problem.numel, wrong, launches=INTERVAL)


def _lamb(problem: _Problem) -> Row:
    lamb = OnebitLamb(problem.params, lr=1e-4, freeze_step=2)
    for _ in range(5):
        lamb.step()
    return problem.row(
        f"OnebitLamb{problem.suffix}", lamb.step, 4 * problem.numel, lambda: _differing_between_ranks(problem.params)
    )


def _differing_between_ranks(params: Sequence[Tensor]) -> int:
    """Elements that are not the same bits on all ranks."""
    count = 0
    for p in params:
        low, high = (p.detach().view(torch.int32).clone() for _ in range(2))
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        count += int((low != high).sum())
    return count


def _over_ranks(count: int, device: torch.device) -> int:
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)


def _distance_from_plain(device: torch.device) -> float:
    """How far the fused steps end from the same steps by plain torch operations, relative to the way made."""
    ends = []
    for codec in (SignCodec(), SignCodec(kernels="reference")):
        problem = _Problem.of("", COMPARED, device, 0)
        start = problem.values()
        optimizer = OnebitAdam(problem.params, lr=1e-4, freeze_step=2, codec=codec)
        generator = torch.Generator(device).manual_seed(100 + dist.get_rank())
        for _ in range(2 + STEPS):
            problem.flat.normal_(generator=generator)
            optimizer.step()
        ends.append(problem.values())
    return float((ends[0] - ends[1]).norm() / (ends[1] - start).norm())
