"""Runs of OnebitAdam on two levels, with the state whole on every rank or in slices, that meet every kind of step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from onebit.optim.merging import merged
from tests.comm.samples import bits, state_bits
from tests.optim.samples import SHAPES, Gradients, all_params, gradients, parameters, patchy, step

# Some tensors in several buckets and slices, and slices without anything of a tensor.
ALL_SHAPES = (*SHAPES, ((70, 50), "rows"), ((40, 3, 5, 2), "channels_last"), ((2001,), "rows"))
CODEC = SignCodec(block_size=32)
UNFUSED = SignCodec(block_size=32, kernels="reference")  # the same payloads, and steps by torch's operations
SMALL_BUCKET = 0.004  # MiB
STEPS = 9

Given = Callable[[Sequence[Tensor], int, int], Gradients]


def late(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
    """Gradients of which some are None; the fourth parameter's come in step 5, after the freeze, on one rank."""
    made = patchy(params, rank, number)
    made[3] = gradients(params, rank, number)[3] if rank == 1 and number >= 5 else None
    return made


def some_bad(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
    """A number that is not finite, on one rank, once in warm-up and once after it."""
    made = gradients(params, rank, number)
    if rank == 2 and number in (1, 6):
        made[0 if number == 1 else -1].view(-1)[3] = math.inf  # type: ignore[union-attr]
    return made


def some_dead(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
    """Every third number is 0 until step 4, so that some entries have no variance before the refresh that follows."""
    made = gradients(params, rank, number)
    for g in made if number < 4 else ():
        g.view(-1)[::3] = 0.0  # type: ignore[union-attr]
    return made


# Options, dtype and gradients.
RUNS: dict[str, tuple[Mapping[str, Any], torch.dtype, Given]] = {
    "plain": ({}, torch.float32, gradients),
    "unused parameters": ({}, torch.float32, patchy),
    "refreshed, first gradients late": ({"variance_refresh": 3}, torch.float32, late),
    "not finite": ({"check_every": 2}, torch.float32, some_bad),
    "bf16": ({}, torch.bfloat16, gradients),
    "bf16 with masters": ({"master_weights": True, "check_every": 1}, torch.bfloat16, patchy),
    "fp16 with masters, dead entries": (
        {"master_weights": True, "variance_refresh": 3, "variance_floor": 0},
        torch.float16,
        some_dead,
    ),
    "bf16, decay in the gradient": ({"adamw_mode": False, "weight_decay": 0.1}, torch.bfloat16, patchy),
    "decay in the gradient": ({"adamw_mode": False, "weight_decay": 0.1}, torch.float32, gradients),
    "maximize, no correction": ({"maximize": True, "bias_correction": False}, torch.float32, gradients),
    "automatic freeze": ({"freeze_step": "auto", "betas": (0.9, 0.5)}, torch.float32, gradients),
}


def make(backend: Backend | None, dtype: torch.dtype = torch.float32, **options: Any) -> OnebitAdam:
    """Three groups, of which one is always dense."""
    params: list[Parameter] = parameters(ALL_SHAPES, dtype)
    groups = [
        {"params": params[:5], "lr": 2e-2},
        {"params": params[5:7], "compress": False},
        {"params": params[7:]},
    ]
    defaults = {"freeze_step": 3, "local_group": 2, "codec": CODEC, "bucket_mb": SMALL_BUCKET}
    return OnebitAdam(groups, lr=1e-2, backend=backend, **{**defaults, **options})


def advance(optimizer: OnebitAdam, rank: int, first: int, last: int, given: Given = gradients) -> list[list[bytes]]:
    """Make steps `first` to `last` - 1; returns the parameters after each."""
    seen = []
    for number in range(first, last):
        step(optimizer, given(all_params(optimizer), rank, number))
        seen.append(bits(all_params(optimizer)))
    return seen


def train(
    backend: Backend, run: str, shard: bool, options: Mapping[str, Any]
) -> tuple[list[list[bytes]], dict[str, Any], int]:
    """One of RUNS; returns the parameters after every step, this rank's state, and how many steps were skipped."""
    more, dtype, given = RUNS[run]
    optimizer = make(backend, dtype, shard=shard, **{**more, **options})
    seen = advance(optimizer, backend.rank, 0, STEPS, given)
    return seen, optimizer.state_dict(), optimizer.skipped_steps


def whole(states: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The states of all ranks, put together where they are slices, bit by bit; options left out."""
    return [state_bits({key: state[key] for key in ("state", "onebit")}) for state in merged(states)]
