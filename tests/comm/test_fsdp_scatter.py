"""onebit.comm.fsdp.compress_reduce_scatter: FSDP2 scatters compressed means, each shard with its own elements."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from onebit.comm import Backend
from onebit.comm.fsdp import compress_reduce_scatter
from onebit.compress import Int8Codec
from tests.comm import oracle
from tests.comm.fsdp_runs import STEPS, Net, Seen, backward, data, gradients, net, sharded, train
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, state_bits

HALF = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float16)
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {  # codec, and the run
    "1 bit": (None, {}),
    "8 bits": (Int8Codec(), {}),
    "resumed": (None, {"resume_at": 3}),
}


def all_runs(backend: Backend) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (backend.size,), mesh_dim_names=("shard",))
    found: dict[str, Any] = {
        name: train(mesh, functools.partial(compress_reduce_scatter, codec=codec), sharding=mesh, **run)
        for name, (codec, run) in RUNS.items()
    }
    found["whole"] = whole(backend)
    found["fp16"] = half(mesh, backend.rank)
    found["detached"] = detached(mesh, backend.rank)
    return found


def whole(backend: Backend) -> list[dict[str, np.ndarray[Any, Any]]]:
    """This rank's whole gradients in the steps of a run on exact means, from the parameters of the run's first step."""
    model = net()
    backward(model, data(backend.rank, 0))
    return [{name: p.grad.double().numpy() for name, p in model.named_parameters() if p.grad is not None}]


@functools.cache
def seen(world_size: int) -> list[dict[str, Any]]:
    return run_ranks("gloo", world_size, all_runs, timeout=240.0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_shard_is_the_mean_of_what_ranks_have_said_of_it(world_size: int) -> None:
    ranks = seen(world_size)
    for shard in range(world_size):
        for name, mean in ranks[shard]["1 bit"].means[0].items():
            parts = [rank["whole"][0][name] for rank in ranks]
            rows = -(-parts[0].shape[0] // world_size)
            given = [part[shard * rows : (shard + 1) * rows].reshape(-1) for part in parts]
            average = oracle.CompressedMean(1, [given[0].size])
            said = [average._say(0, x, np.zeros(x.size), on_server=False) for x in given]
            right = np.mean(said, axis=0)
            largest = max([1e-30, *(np.abs(x).max(initial=0) for x in given)])
            # Gradients of a model that is sharded are those of one that is not, to a few roundings of fp32.
            assert np.abs(mean.double().numpy().reshape(-1) - right).max(initial=0) <= 32 * oracle.UNIT * largest, name


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_was_given_has_been_said_or_is_held(world_size: int, name: str) -> None:
    """Over all steps: the sum of exact means is the sum of what was scattered and the mean of what ranks hold."""
    ranks = seen(world_size)
    runs: list[Seen] = [rank[name] for rank in ranks]
    for module in runs[0].states[-1]["modules"]:
        residuals = [run.states[-1]["modules"][module]["residual"] for run in runs]
        held = torch.stack([state["worker"].double() for state in residuals]).mean(0)
        parts = list(torch.split(held, residuals[0]["numels"]))
        names = [n for n in runs[0].own[0] if n.startswith(f"{module}." if module else ("first", "gain", "last"))]
        names = sorted(names, key=lambda name: name == "gain")
        assert len(parts) == world_size * len(names)
        for shard, run in enumerate(runs):
            for index, one in enumerate(names):
                exact = torch.stack([step[one].double().reshape(-1) for step in run.own]).sum(0)
                said = torch.stack([step[one].double().reshape(-1) for step in run.means]).sum(0)
                left = parts[shard * len(names) + index]
                assert not left[exact.numel() :].any(), "what fills a shard up holds feedback"
                off = (exact - said - left[: exact.numel()]).abs().max().item() if exact.numel() else 0.0
                largest = max([float(g[one].abs().max()) for g in (*run.own, *run.means) if g[one].numel()] or [0.0])
                assert off <= STEPS * 16 * oracle.UNIT * largest, (module, one, off)  # sums of fp32 in each step


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(world_size: int) -> None:
    for rank in seen(world_size):
        assert rank["resumed"].params == rank["1 bit"].params
        assert state_bits(rank["resumed"].states[-1]) == state_bits(rank["1 bit"].states[-1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_sent_are_those_of_the_formula(world_size: int) -> None:
    params = {name: p for name, p in Net().named_parameters() if p.requires_grad}
    units = [[n for n in params if not n.startswith("blocks")], *([f"blocks.{i}." for i in range(2)],)]
    wire = 0
    for unit in (units[0], *([n for n in params if n.startswith(prefix)] for prefix in units[1])):
        shards = [-(-params[name].shape[0] // world_size) * params[name][0].numel() for name in unit]
        wire += oracle.wire_bytes(world_size, shards * world_size) // 2  # one of the two phases
    for rank in seen(world_size):
        assert rank["1 bit"].stats[0] == STEPS * wire


def half(mesh: Any, rank: int) -> float:
    """fp16, which FSDP divides before it sums: relative distance to the exact mean on 8 bits."""
    found = []
    for codec in (None, Int8Codec()):
        model = sharded(mesh, mp_policy=HALF)
        if codec is not None:
            compress_reduce_scatter(model, codec)
        model(data(rank, 0)).float().square().mean().backward()
        found.append(torch.cat([g.double().reshape(-1) for g in gradients(model).values()]))
    return float((found[0] - found[1]).norm() / found[0].norm())


def test_sums_are_scaled_as_fsdp_scales_them() -> None:
    for rank in seen(2):
        assert rank["fp16"] < 0.03  # 8 bits keep a percent


def detached(mesh: Any, rank: int) -> bool:
    model, plain = sharded(mesh), sharded(mesh)
    compress_reduce_scatter(model).detach()
    for one in (model, plain):
        backward(one, data(rank, 0))
    compress_reduce_scatter(model)
    return bits(list(gradients(model).values())) == bits(list(gradients(plain).values()))


def test_detached_hooks_leave_the_model_to_fsdp() -> None:
    assert all(rank["detached"] for rank in seen(3))


def divided(backend: Backend) -> str:
    """An operation that says nothing of what to divide by."""
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (backend.size,)))
    compress_reduce_scatter(model)
    hook = model._get_fsdp_state()._fsdp_param_groups[0]._reduce_scatter_comm  # type: ignore[attr-defined]
    try:
        hook(torch.zeros(10), torch.zeros(20), dist.group.WORLD, dist.ReduceOp.MAX)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_another_operation_is_refused() -> None:
    for message in run_ranks("gloo", 2, divided):
        assert "InputError" in message
        assert "the mean and the sum" in message
        assert "set_gradient_divide_factor" in message
