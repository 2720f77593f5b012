"""Checkpoints of optimizers with parameters on CUDA devices: resumed bit for bit, also through DCP, and elastic."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn import Parameter

from onebit.comm import Backend, make_backend
from onebit.optim import CompressedOptimizer, check_replicas, checkpoint, sharded
from tests.comm.launcher import run_ranks
from tests.faults.training import MAKERS, feedback
from tests.optim.resumable import copies, put
from tests.optim.samples import all_params, checksum, contents, values

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SHAPES = ((1500, 64), (513,), (0,), (), (64, 33))
SAVED, STEPS = 7, 12


def make(name: str, backend: Backend, dtype: torch.dtype = torch.float32) -> CompressedOptimizer:
    params = [Parameter(values(i, shape=shape).to("cuda", dtype)) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
    optimizer: CompressedOptimizer = MAKERS[name](
        groups, lr=1e-2, backend=backend, master_weights=dtype != torch.float32
    )
    return optimizer


def train(optimizer: CompressedOptimizer, rank: int, first: int, last: int) -> None:
    for number in range(first, last):
        for i, p in enumerate(all_params(optimizer)):
            absent = (i + number + rank) % 5 == 0
            p.grad = None if absent else values(i, number, rank, shape=tuple(p.shape)).to(p)
        optimizer.step()


def seen(optimizer: CompressedOptimizer) -> tuple[str, str]:
    """Checksums of parameters, moments and counts, and of error feedback."""
    saved = optimizer.state_dict()
    return checksum(contents(optimizer)), checksum(feedback(saved).cpu().numpy().tobytes())


def resume(backend: Backend, name: str, dtype: torch.dtype, by: str, folder: str) -> list[Any]:
    """What an uninterrupted run ends with, and one that goes on from what was saved on the way."""
    optimizer = make(name, backend, dtype)
    train(optimizer, backend.rank, 0, SAVED)
    values_then = copies(optimizer)
    if by == "file":
        checkpoint.save(folder, optimizer, params=[value.cpu() for value in values_then])
    elif by == "dcp":
        dcp.save(
            {"params": dict(enumerate_named(values_then)), "optimizer": sharded.tensors_of(optimizer)},
            checkpoint_id=folder,
            process_group=dist.new_group(backend="gloo"),
        )
    state = copy.deepcopy(optimizer.state_dict()) if by == "state_dict" else None  # else it goes on with the run
    train(optimizer, backend.rank, SAVED, STEPS)

    other = make(name, backend, dtype)
    train(other, backend.rank, 0, 2)  # what is loaded replaces something
    if by == "file":
        put(all_params(other), checkpoint.load(folder, other)["params"])
    elif by == "dcp":
        group = dist.new_group(backend="gloo")
        sizes = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        room = {
            "params": dict(enumerate_named([torch.empty_like(value, device="cpu") for value in values_then])),
            "optimizer": sharded.room_for(other, sizes, prefix="optimizer."),
        }
        dcp.load(room, checkpoint_id=folder, process_group=group)
        put(all_params(other), list(room["params"].values()))
        sharded.load(other, room["optimizer"])
    else:
        assert state is not None
        put(all_params(other), values_then)
        other.load_state_dict(state)
    devices = {t.device.type for entry in other.state.values() for key, t in entry.items() if key.startswith("exp_avg")}
    train(other, backend.rank, SAVED, STEPS)
    check_replicas(other)
    return [seen(optimizer), seen(other), devices]


def enumerate_named(tensors: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(f"p{i}", tensor) for i, tensor in enumerate(tensors)]


@TWO
@pytest.mark.parametrize(
    ("name", "dtype", "by"),
    [
        ("OnebitAdam", torch.float32, "file"),
        ("OnebitAdam", torch.bfloat16, "state_dict"),
        ("OnebitAdam", torch.float32, "dcp"),
        ("OnebitLamb", torch.float32, "file"),
        ("ZeroOneAdam", torch.float32, "file"),
    ],
)
def test_a_resumed_run_is_bit_equal(name: str, dtype: torch.dtype, by: str, tmp_path: Path) -> None:
    for rank, (whole, resumed, devices) in enumerate(
        run_ranks("nccl", 2, resume, name, dtype, by, str(tmp_path), timeout=180.0)
    ):
        assert whole == resumed, (rank, whole, resumed)
        assert devices == {"cuda"}, (rank, devices)


def save_at(backend: Backend, name: str, folder: str) -> None:
    optimizer = make(name, backend)
    train(optimizer, backend.rank, 0, SAVED)
    checkpoint.save(folder, optimizer, params=[value.cpu() for value in copies(optimizer)])


def go_on(backend: Backend, name: str, folder: str) -> tuple[str, bool, list[int]]:
    """Load on another number of ranks; what all ranks must have in common then, and whether it is finite."""
    optimizer = make(name, backend)
    extra = checkpoint.load(folder, optimizer)
    put(all_params(optimizer), extra["params"])
    train(optimizer, backend.rank, SAVED, STEPS)
    synchronize = getattr(optimizer, "synchronize", None)
    if synchronize is not None:
        synchronize()
    check_replicas(optimizer)
    finite = all(bool(p.isfinite().all()) for p in all_params(optimizer))
    return checksum(contents(optimizer)), finite, [group["step"] for group in optimizer.param_groups]


@TWO
@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_of_two_gpus_goes_on_on_one_and_one_of_one_on_two(name: str, tmp_path: Path) -> None:
    for old, new in ((2, 1), (1, 2)):
        folder = str(tmp_path / f"{old}")
        run_ranks("nccl", old, save_at, name, folder, timeout=120.0)
        told = run_ranks("nccl", new, go_on, name, folder, timeout=120.0)
        assert len({one[0] for one in told}) == 1, (old, new, told)
        assert all(finite and steps == [STEPS] * 2 for _, finite, steps in told), (old, new, told)


def test_one_gpu_resumes_bit_for_bit_from_its_file(tmp_path: Path) -> None:
    backend = make_backend("single")
    for name in MAKERS:
        optimizer, other = make(name, backend), make(name, backend)
        train(optimizer, 0, 0, SAVED)
        checkpoint.save(tmp_path / name, optimizer, params=[value.cpu() for value in copies(optimizer)])
        train(optimizer, 0, SAVED, STEPS)
        put(all_params(other), checkpoint.load(tmp_path / name, other)["params"])
        train(other, 0, SAVED, STEPS)
        assert seen(optimizer) == seen(other), name
