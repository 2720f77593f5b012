"""Train the study's GPT under hybrid sharding (HSDP), with FSDP's own average over replicas and with compressed ones.

    torchrun --nproc-per-node 4 examples/train_gpt_hsdp.py --compile              # 2 replicas of 2 shards each
    torchrun --nproc-per-node 4 examples/train_gpt_hsdp.py --averages fsdp int8 onebit-adam --steps 1500 --warmup 0.3

The runs are made one after the other, from the same weights and on the same samples. Each prints its held-out loss,
what a rank has sent to other replicas, and its time; all of them become one JSON document, with losses in training and
norms of gradients. What onebit adds to FSDP is in `shard`. A run of fewer steps needs a larger share of warm-up, as the
variance must not be frozen before attention is learned.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from ranks import checksums, mean_over_ranks
from study import add_settings, changes
from study_plan import RECIPES, Run
from study_tasks import Task, learning_rate_factor, make_task
from study_train import VARIANTS, evaluate, join, make_optimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from onebit.benchmarks import record
from onebit.benchmarks.options import parse_codec
from onebit.comm import make_backend
from onebit.comm.backend import Backend
from onebit.comm.fsdp import UnitHooks, compress_gradients
from onebit.comm.stats import Stats, fp32_bytes
from onebit.optim import OnebitAdam

NATIVE = "fsdp"  # the average over replicas that FSDP makes by itself, in fp32
ONEBIT = tuple(VARIANTS)  # none, and an optimizer over this rank's shards that averages over replicas by itself
STRETCH = 25  # steps that are one point of a curve


def main() -> None:
    options = parse()
    world, device = join()
    mesh = init_device_mesh(
        device.type, (options.replicas, world.size // options.replicas), mesh_dim_names=("replicate", "shard")
    )
    recipe = RECIPES[options.task]
    run = recipe.run(options.task, "adamw", world.size, options.seed, changes(options))
    task = make_task(run)
    how = {"ranks": world.size, "replicas": options.replicas, "compiled": options.compile}
    rows = []
    for average in options.averages:
        rows.append(train(run, task, average, mesh, world, device, options.compile))
        if world.rank == 0:  # saved after each, so that a run that is stopped keeps those before
            document = record.make(f"hsdp-{run.task}", {**asdict(run), **how}, rows, device.type)
            print(f"{summary(rows)}; {record.save(document, options.folder)}", flush=True)
    world.barrier()  # nobody leaves, and takes the others down, before the record is written
    dist.destroy_process_group()


def shard(
    model: nn.Module, average: str, mesh: DeviceMesh, start_step: int, device: torch.device, compiled: bool
) -> UnitHooks | None:
    """Apply `fully_shard` to the blocks and to the model; returns the hooks where another than FSDP averages."""
    native = average == NATIVE
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    blocks: Any = model.blocks
    for index in range(len(blocks)):
        if compiled:
            blocks[index] = torch.compile(blocks[index])
        fully_shard(blocks[index], mesh=mesh if native else mesh["shard"], mp_policy=policy)
    fully_shard(model, mesh=mesh if native else mesh["shard"], mp_policy=policy)
    if native or average in ONEBIT:
        return None
    return compress_gradients(model, mesh["replicate"], parse_codec(average), start_step=start_step)


def train(
    run: Run, task: Task, average: str, mesh: DeviceMesh, world: Backend, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """One run with one kind of average over replicas; returns its row, the same on all ranks but for the times."""
    torch.manual_seed(run.seed)
    model = task.make_model().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    torch._dynamo.config.suppress_errors = True  # without a C compiler it trains all the same, after a warning
    hooks = shard(model, average, mesh, run.freeze_step, device, compiled)
    whole: Any = model
    replicas = make_backend(mesh.get_group("replicate"), device=device)
    own = [nn.Parameter(part) for part in shards(model)] if average in ONEBIT else []  # the model's own memory
    chosen = replace(run, optimizer=average if own else run.optimizer)
    optimizer = make_optimizer(chosen, own or list(model.parameters()), replicas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, run))
    held_out = [(x.to(device), y.to(device)) for x, y in task.held_out()[world.rank :: world.size]]
    due = {run.steps * part // run.evaluations for part in range(1, run.evaluations + 1)}
    draw = torch.Generator().manual_seed(1_000_003 * run.seed)  # the same samples on all ranks, which share them out
    row: dict[str, Any] = {"case": average, "parameters": parameters, "steps": run.steps, "held_out": []}
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    stretches: list[float] = []
    since = 0
    start = began = clock(device)
    for number in range(run.steps):
        inputs, targets = (part[world.rank :: world.size].to(device) for part in task.draw(draw))
        model.zero_grad()
        loss = task.loss(model, inputs, targets)
        loss.backward()
        sharded: Any = nn.utils.clip_grad_norm_(model.parameters(), math.inf if own or not run.clip else run.clip)
        norm: Tensor = sharded.full_tensor()
        if own:
            norm = hand_over(model, own, norm, run.clip or math.inf, replicas)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        norms.append(norm)
        if number + 1 in due:
            stretches.append((clock(device) - began) / (number + 1 - since))
            row["held_out"].append({"step": number + 1, "loss": evaluate(task, model, held_out, world, device)})
            whole.reshard()  # without a backward FSDP leaves the outermost module whole
            began, since = clock(device), number + 1
    row["seconds"] = clock(device) - start
    row["seconds_per_step"] = {"first": stretches[0], "median": median(stretches[1:] or stretches)}
    row["loss"] = mean_over_ranks([torch.stack(losses[-100:]).mean().item()], world, device)[0]
    stats = optimizer.stats if isinstance(optimizer, OnebitAdam) else None if hooks is None else hooks.stats
    row["curve"] = curve(losses, norms, world, device)
    row |= sent(stats, model, run, replicas)
    equal = len(set(checksums(shards(model), replicas))) == 1
    row["replicas_equal"] = mean_over_ranks([float(equal)], world, device) == [1.0]
    return row


def hand_over(model: nn.Module, own: list[nn.Parameter], norm: Tensor, bound: float, replicas: Backend) -> Tensor:
    """Give the optimizer this rank's shards of gradients, scaled by one factor for all replicas.

    norm: of this replica's gradient; `bound` holds for the power mean of those of all replicas, which is returned.
    """
    squares = norm.square().reshape(1)
    replicas.all_reduce(squares).wait()
    total = (squares / replicas.size).sqrt()
    factor = (bound / total).clamp(max=1.0)
    for held, p in zip(own, model.parameters(), strict=True):
        held.grad = p.grad.to_local().mul_(factor) if isinstance(p.grad, DTensor) else None
    return total.squeeze(0)


def curve(losses: list[Tensor], norms: list[Tensor], world: Backend, device: torch.device) -> list[dict[str, float]]:
    """Of each stretch its last step, the mean loss over ranks, and the mean and the largest norm before clipping."""
    parts = [torch.stack(numbers).split(STRETCH) for numbers in (losses, norms)]
    loss, norm = (mean_over_ranks([float(part.mean()) for part in listed], world, device) for listed in parts)
    largest = [float(part.max()) for part in parts[1]]
    steps = [min((number + 1) * STRETCH, len(losses)) for number in range(len(largest))]
    names = ("step", "loss", "norm", "largest_norm")
    return [dict(zip(names, point, strict=True)) for point in zip(steps, loss, norm, largest, strict=True)]


def sent(stats: Stats | None, model: nn.Module, run: Run, replicas: Backend) -> dict[str, Any]:
    """Bytes that this rank has sent to other replicas: counted by ours, by the formula of an all-reduce for FSDP's."""
    if stats is not None:
        return {"wire_bytes": stats.wire_bytes, "counted": True, "dense_steps": run.freeze_step}
    elements = sum(part.numel() for part in shards(model))
    return {"wire_bytes": run.steps * fp32_bytes(elements, replicas.size), "counted": False, "dense_steps": run.steps}


def shards(model: nn.Module) -> list[Tensor]:
    """This rank's part of every parameter."""
    return [p.to_local().detach() for p in model.parameters() if isinstance(p, DTensor)]


def clock(device: torch.device) -> float:
    """Seconds, once all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(rows: list[dict[str, Any]]) -> str:
    """The last row in one line, beside the first."""
    first, row = rows[0], rows[-1]
    loss, baseline = row["held_out"][-1]["loss"], first["held_out"][-1]["loss"]
    return (
        f"{row['case']}: held-out loss {loss:.4f} ({loss / baseline - 1:+.2%} of {first['case']}), "
        f"{row['wire_bytes'] / 1e6:.1f} MB sent to replicas (1/{first['wire_bytes'] / row['wire_bytes']:.1f}), "
        f"{1e3 * row['seconds_per_step']['median']:.1f} ms a step, {row['seconds']:.0f} s; "
        f"replicas equal: {row['replicas_equal']}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a GPT under HSDP with plain and compressed averages.")
    parser.add_argument("--task", choices=("gpt", "bytes"), default="gpt")
    parser.add_argument(
        "--averages",
        nargs="+",
        default=[NATIVE, "int8"],
        help=f"{NATIVE}, a codec as of onebit.benchmarks, or one of {', '.join(ONEBIT)}",
    )
    parser.add_argument("--replicas", type=int, default=2, help="the other ranks are shards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="blocks with torch.compile")
    add_settings(parser)
    parser.set_defaults(folder=record.default_folder())
    return parser.parse_args()


if __name__ == "__main__":
    main()
