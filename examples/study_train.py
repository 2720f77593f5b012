"""One run of the convergence study: the same loop for every optimizer, and its record."""

from __future__ import annotations

import copy
import os
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import checksums, mean_over_ranks
from record import Record, environment
from study_plan import ADAMW, LOCAL, Run
from study_tasks import Task, learning_rate_factor, make_task
from torch import Tensor, nn
from torch.optim import Optimizer

from onebit.comm import CompressedAllreduce, DenseAllreduce, make_backend, run_threads
from onebit.comm.backend import Backend
from onebit.compress import Fp8Codec, Int4Codec, Int8Codec, set_num_threads
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam, clip_grad_norm_

OURS = (OnebitAdam, ZeroOneAdam, OnebitLamb)
# Of OnebitAdam, by name of the run's optimizer; all of them keep what was not said.
VARIANTS: dict[str, dict[str, Any]] = {
    "onebit-adam": {},
    "onebit-adam-auto": {"freeze_step": "auto"},
    "onebit-adam-refresh": {"variance_refresh": 25},
    "onebit-adam-fp8": {"codec": Fp8Codec()},
    "onebit-adam-int8": {"codec": Int8Codec()},
    "onebit-adam-int4": {"codec": Int4Codec()},
    "onebit-adam-int4-stochastic": {"codec": Int4Codec(rounding="stochastic")},
    "onebit-adam-int4-rotated": {"codec": Int4Codec(rotate=True)},
    "onebit-adam-two-level": {"local_group": LOCAL["onebit-adam-two-level"]},
}
# Of gradients that torch's AdamW takes, where they are not averaged in fp32; nothing is kept of what was not said.
GRADIENTS = {
    "adamw-int8": Int8Codec(error_feedback=False),
    "adamw-int4": Int4Codec(error_feedback=False, rounding="stochastic", rotate=True),
}


@dataclass
class StudyRecord(Record):
    """A run's record; `seconds` are those of the host, which on CUDA does not wait for the device in a step.

    On two levels bytes are those that left the node.

    Attributes:
        collectives: collectives started, per step.
        held_out: steps made and held-out loss, several times in the run.
        total_seconds: time of all steps, evaluations included.
        skipped_steps: steps not made because of a number that is not finite.
    """

    collectives: list[int] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    total_seconds: float = float("nan")
    skipped_steps: int = 0


def make_runs(runs: list[Run], folder: Path, compiled: bool) -> None:
    """Make those of `runs`, which differ in optimizer and seed alone, that have no record in `folder` yet.

    Under torchrun this process is one rank, else all ranks are threads of it.
    """
    todo = [run for run in runs if not (folder / f"{run.name}.json").exists()]
    if not todo:
        return
    task = make_task(todo[0])
    start = {run.seed: _start(task, run.seed) for run in todo}
    if "RANK" in os.environ:
        backend, device = join()
        _all(todo, task, start, folder, compiled, backend, device)
        dist.destroy_process_group()
        return
    device = torch.device("cpu")
    run_threads(
        todo[0].ranks, lambda backend: _all(todo, task, start, folder, compiled, backend, device), timeout=600.0
    )


def _all(
    runs: list[Run],
    task: Task,
    start: dict[int, nn.Module],
    folder: Path,
    compiled: bool,
    backend: Backend,
    device: torch.device,
) -> None:
    """Every run on one rank; all in one model, so that it is compiled once."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # holds for this thread
        set_num_threads(1)
    model = copy.deepcopy(start[runs[0].seed]).to(device)
    if compiled:
        torch._dynamo.config.suppress_errors = True  # without a C compiler it trains all the same, after a warning
    called = torch.compile(model) if compiled else model
    for run in runs:
        model.load_state_dict(start[run.seed].state_dict())
        record = train(run, task, model, called, backend, device)
        if backend.rank == 0:
            record.write(folder / f"{run.name}.json")
            print(f"{run.name}: held-out loss {record.held_out_loss:.4f}, {record.total_seconds:.0f} s", flush=True)
        backend.barrier()  # nobody leaves, and takes the others down, before the record is written


def train(
    run: Run, task: Task, model: nn.Module, called: nn.Module, backend: Backend, device: torch.device
) -> StudyRecord:
    """Train `model`, through `called`, from what it holds; returns the record, equal on all ranks but for the times."""
    parameters = list(model.parameters())
    optimizer = make_optimizer(run, parameters, backend)
    average = make_average(run, parameters, backend)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, run))
    held_out = [(x.to(device), y.to(device)) for x, y in task.held_out()[backend.rank :: backend.size]]
    due = {run.steps * part // run.evaluations for part in range(1, run.evaluations + 1)}
    draw = torch.Generator().manual_seed(1_000_003 * run.seed)  # the same samples on all ranks, which share them out
    losses: list[Tensor] = []
    record = StudyRecord(asdict(run), environment(device, backend), sum(p.numel() for p in parameters))
    plain = "compressed" if run.optimizer in GRADIENTS else "dense"
    began = time.perf_counter()
    for number in range(run.steps):
        started = time.perf_counter()
        phase = optimizer.phase() if isinstance(optimizer, OURS) else plain
        inputs, targets = (part[backend.rank :: backend.size].to(device) for part in task.draw(draw))
        optimizer.zero_grad()
        with _mixed(device):
            loss = task.loss(called, inputs, targets)
        loss.backward()
        computed, before = time.perf_counter(), traffic(optimizer, backend)
        if average is not None:
            average([p.grad for p in parameters if p.grad is not None])
        if run.clip:
            _clip(optimizer, parameters, run.clip)
        optimizer.step()
        schedule.step()
        if number + 1 == run.steps and isinstance(optimizer, ZeroOneAdam):
            optimizer.synchronize()  # the last interval of local steps may not be over
        finished, after = time.perf_counter(), traffic(optimizer, backend)
        losses.append(loss.detach())
        record.add(
            loss=float("nan"),
            phase=phase,
            wire_bytes=after[0] - before[0],
            seconds=round(finished - started, 6),
            update_seconds=round(finished - computed, 6),
        )
        record.collectives.append(after[1] - before[1])
        if number + 1 in due:
            record.held_out.append((number + 1, evaluate(task, model, held_out, backend, device)))
    record.total_seconds = time.perf_counter() - began
    record.loss = mean_over_ranks(torch.stack(losses).tolist(), backend, device)
    record.held_out_loss = record.held_out[-1][1]
    record.skipped_steps = getattr(optimizer, "skipped_steps", 0)
    record.checksums = checksums(parameters, backend)
    return record


def _clip(optimizer: Optimizer, parameters: list[nn.Parameter], bound: float) -> None:
    """Bound the gradients' norm: of their mean, or by one factor for all ranks, or each rank its own."""
    if isinstance(optimizer, (OnebitAdam, OnebitLamb)):
        clip_grad_norm_(optimizer, bound)
    else:  # AdamW's gradients are averaged already, and ZeroOneAdam's ranks do not meet in every step
        nn.utils.clip_grad_norm_(parameters, bound)


def traffic(optimizer: Optimizer, backend: Backend) -> tuple[int, int]:
    """Bytes that this rank has sent so far, but those to ranks of its node, and the collectives that it has started."""
    if not isinstance(optimizer, OURS):
        return backend.traffic.wire_bytes, backend.traffic.collectives
    stats = optimizer.stats
    return stats.wire_bytes - stats.local_bytes, stats.collectives


def make_average(
    run: Run, parameters: list[nn.Parameter], backend: Backend
) -> DenseAllreduce | CompressedAllreduce | None:
    """What averages the gradients, where the optimizer does not do it."""
    if run.optimizer in GRADIENTS:
        return CompressedAllreduce(parameters, backend, GRADIENTS[run.optimizer])
    return DenseAllreduce(parameters, backend) if run.optimizer in ADAMW else None


def make_optimizer(run: Run, parameters: list[nn.Parameter], backend: Backend) -> Optimizer:
    """The optimizer of a run; vectors, such as biases, are not decayed."""
    decay = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": run.weight_decay}]
    rest = [p for p in parameters if p.dim() <= 1]
    groups = [*decay, *([{"params": rest, "weight_decay": 0.0}] if rest else [])]
    common: dict[str, Any] = {"lr": run.lr, "betas": (0.9, run.beta2), "eps": run.eps}
    if run.optimizer in ADAMW:
        return torch.optim.AdamW(groups, **common)
    if run.optimizer in VARIANTS:
        return OnebitAdam(
            groups, **common, **{"freeze_step": run.freeze_step, **VARIANTS[run.optimizer]}, backend=backend
        )
    if run.optimizer == "zero-one-adam":
        return ZeroOneAdam(
            groups,
            **common,
            var_freeze_step=run.freeze_step,
            var_update_scaler=max(16, run.freeze_step // 5),  # half of a short warm-up's steps, or v lags behind
            local_step_scaler=max(1, round(run.doubling * run.steps)),
            backend=backend,
        )
    bounds = (0.5, 4.0) if run.optimizer == "onebit-lamb" else (1.0, 1.0)
    factor = {"factor_min": bounds[0], "factor_max": bounds[1]}
    freeze_step = run.steps if run.optimizer == "lamb" else run.freeze_step  # LAMB never freezes
    return OnebitLamb(groups, **common, **factor, freeze_step=freeze_step, backend=backend)


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, batches: list[tuple[Tensor, Tensor]], backend: Backend, device: torch.device
) -> float:
    """The mean loss over the held-out samples, of which `batches` is this rank's share."""
    total, count = torch.zeros((), device=device), 0
    with _mixed(device):
        for inputs, targets in batches:
            total += task.loss(model, inputs, targets) * len(inputs)
            count += len(inputs)
    loss, samples = mean_over_ranks([float(total), float(count)], backend, device)
    return loss / samples


def _start(task: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return task.make_model()


def join() -> tuple[Backend, torch.device]:
    """Meet the other ranks that torchrun started."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return make_backend(None, device=device), device


def _mixed(device: torch.device) -> AbstractContextManager[object]:
    """bf16 products on a GPU; fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
