"""Who takes part in a training run: ways to average under PyTorch's AdamW, and the optimizers of this library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

from onebit.comm.backend import Backend
from onebit.optim import OnebitAdam, ZeroOneAdam

BETAS = (0.9, 0.95)  # a variance that is frozen after some hundred steps should have forgotten the first ones by then
POWERSGD_RANK = 4  # what its authors take for language models
PLAIN = "AdamW, DDP"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is the same for all contenders of a run.

    Attributes:
        steps: how many each makes.
        exact: the first steps, in which everybody who compresses averages exactly (`ZeroOneAdam`: mostly so).
        sparse: steps after which `ZeroOneAdam` doubles the gap between its synchronisations.
        lr: the highest learning rate.
    """

    steps: int
    exact: int
    sparse: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model in training.

    Attributes:
        model: what is called; `DistributedDataParallel` averages in its backward.
        optimizer: over all its parameters.
        kind: what the next step is: ``"exact"``, ``"compressed"`` or ``"local"``.
        finish: makes the parameters of all ranks equal after the last step; collective.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    kind: Callable[[], str]
    finish: Callable[[], None] = field(default=lambda: None)


def adamw(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """PyTorch's own, in its fastest form."""
    return torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=BETAS, fused=True)


def _plain(model: nn.Module, plan: Plan, backend: Backend) -> Trainee:
    return Trainee(model=DistributedDataParallel(model), optimizer=adamw(model, plan), kind=lambda: "exact")


def _fp16(model: nn.Module, plan: Plan, backend: Backend) -> Trainee:
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return Trainee(model=ddp, optimizer=adamw(model, plan), kind=lambda: "compressed")


def _powersgd(model: nn.Module, plan: Plan, backend: Backend) -> Trainee:
    # One bucket: the hook starts later collectives from threads of its own, and those of several buckets would be
    # started in another order on each rank, which over Gloo has been seen to wait for ever.
    ddp = DistributedDataParallel(model, bucket_cap_mb=1 << 14)
    state = powersgd.PowerSGDState(
        None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=max(2, plan.exact)
    )
    ddp.register_comm_hook(state, powersgd.powerSGD_hook)
    return Trainee(
        model=ddp,
        optimizer=adamw(model, plan),
        kind=lambda: "exact" if state.iter < state.start_powerSGD_iter else "compressed",
    )


def _onebit_adam(model: nn.Module, plan: Plan, backend: Backend) -> Trainee:
    optimizer = OnebitAdam(model.parameters(), lr=plan.lr, betas=BETAS, freeze_step=plan.exact, backend=backend)
    names = {"warmup": "exact", "compressed": "compressed"}
    return Trainee(model=model, optimizer=optimizer, kind=lambda: names[optimizer.phase()])


def _zero_one_adam(model: nn.Module, plan: Plan, backend: Backend) -> Trainee:
    optimizer = ZeroOneAdam(
        model.parameters(),
        lr=plan.lr,
        betas=BETAS,
        var_freeze_step=plan.exact,
        var_update_scaler=max(16, plan.exact // 5),  # half of a short warm-up's steps, or v lags behind
        local_step_scaler=plan.sparse,
        backend=backend,
    )
    names = {"variance": "exact", "sync": "compressed", "local": "local"}
    return Trainee(
        model=model, optimizer=optimizer, kind=lambda: names[optimizer.phase()], finish=optimizer.synchronize
    )


CONTENDERS: Mapping[str, Callable[[nn.Module, Plan, Backend], Trainee]] = {
    PLAIN: _plain,
    "AdamW, fp16_compress_hook": _fp16,
    f"AdamW, PowerSGD of rank {POWERSGD_RANK}": _powersgd,
    "OnebitAdam": _onebit_adam,
    "ZeroOneAdam": _zero_one_adam,
}
