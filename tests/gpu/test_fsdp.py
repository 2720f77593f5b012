"""onebit.comm.fsdp over NCCL: shards on GPUs averaged over replicas, and scattered, as on CPUs; and a model learns."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from onebit.comm import Backend, CompressedAllreduce
from onebit.comm.fsdp import compress_gradients, compress_reduce_scatter
from onebit.compress import Int8Codec
from tests.comm.fsdp_runs import Seen, backward, data, gradients, hybrid_mesh, net, over_replicas, sharded, train
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, state_bits

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of compress_gradients, and of the run
    "1 bit": ({}, {}),
    "resumed": ({}, {"resume_at": 3}),
    "8 bits": ({"codec": Int8Codec()}, {}),
    "small buckets": ({"bucket_mb": 0.004}, {}),
    "warm-up": ({"start_step": 2}, {}),
    "bf16 products": ({}, {"mp_policy": MIXED}),
    "bf16": ({}, {"mp_policy": BF16}),
}
SHAPES = [
    pytest.param(2, 2, id="2 replicas of 1"),
    pytest.param(
        4, 2, id="2 replicas of 2", marks=pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs 4 GPUs")
    ),
]


def all_runs(backend: Backend, replicas: int) -> dict[str, Any]:
    mesh = hybrid_mesh("cuda", replicas)
    found: dict[str, Any] = {
        name: train(mesh, over_replicas(mesh, **options), device="cuda", **run) for name, (options, run) in RUNS.items()
    }
    found["accumulated"] = accumulated(mesh, backend.rank)
    found["native"] = beside_native(mesh, backend.rank)
    found["unwatched"] = unwatched(mesh, backend.rank)
    found["expected"] = {name: averages(mesh, name, found[name]) for name in RUNS}
    return on_host(found)


def on_host(found: Any) -> Any:
    """The same with its tensors on the host, whose devices are no longer there for who reads them."""
    if isinstance(found, torch.Tensor):
        return found.cpu()
    if isinstance(found, dict):
        return {key: on_host(value) for key, value in found.items()}
    if isinstance(found, list):
        return [on_host(value) for value in found]
    if isinstance(found, Seen):
        return Seen(*(on_host(value) for value in vars(found).values()))
    return found


def averages(mesh: Any, name: str, run: Seen) -> list[list[bytes]]:
    """What one average of the plain shards of a run has, step by step."""
    options = RUNS[name][0]
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    steps = [[g.to(dtype) for g in step.values()] for step in run.own]
    reduce = CompressedAllreduce(steps[0], mesh.get_group("replicate"), options.get("codec"))
    for step in steps[options.get("start_step", 0) :]:
        reduce(step)
    return [bits([g.float() for g in step]) for step in steps]


def accumulated(mesh: Any, rank: int) -> tuple[float, int]:
    """Two micro-batches of fp32 sums: how far from the gradient of both at once, and how many averages."""
    found = []
    for pieces in (2, 1):
        model = sharded(mesh["shard"], "cuda")
        hooks = compress_gradients(model, mesh["replicate"], start_step=1)
        *first, last = data(rank, 0, "cuda").chunk(pieces)
        model.set_requires_gradient_sync(False)
        for part in first:
            (model(part).square().mean() / pieces).backward()
        model.set_requires_gradient_sync(True)
        (model(last).square().mean() / pieces).backward()
        found.append(torch.cat([g.reshape(-1) for g in gradients(model).values()]))
    return float((found[0] - found[1]).norm() / found[1].norm()), hooks.stats.calls


def beside_native(mesh: Any, rank: int) -> float:
    """How far our fp32 average is from that of FSDP's own HSDP."""
    found = []
    for native in (True, False):
        model = fully_shard(net("cuda"), mesh=mesh if native else mesh["shard"])
        if not native:
            compress_gradients(model, mesh["replicate"], start_step=1)
        backward(model, data(rank, 0, "cuda"))
        found.append(torch.cat([g.reshape(-1) for g in gradients(model).values()]))
    return float((found[0] - found[1]).norm() / found[0].norm())


def unwatched(mesh: Any, rank: int) -> list[bytes]:
    """Parameters after steps that the host does not wait for, and after the same steps with waits.

    Gradients are reduced in another dtype than the parameters', so what held them is free once it has been converted,
    and a unit's memory would go to the next one's gradients while they are averaged.
    """
    found = []
    for waits in (False, True):
        torch.manual_seed(1)
        model: Any = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(6)))
        model.cuda()
        for layer in model:
            fully_shard(layer, mesh=mesh["shard"], mp_policy=BF16)
        fully_shard(model, mesh=mesh["shard"], mp_policy=BF16)
        compress_gradients(model, mesh["replicate"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(rank)
        batches = [torch.randn(64, 1024, generator=generator).cuda() for _ in range(20)]
        for x in batches:
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            if waits:
                torch.cuda.synchronize()
            optimizer.step()
        found.append(b"".join(bits([p.to_local() for p in model.parameters()])))
    return found


@functools.cache
def seen(world_size: int, replicas: int) -> list[dict[str, Any]]:
    return run_ranks("nccl", world_size, all_runs, replicas, timeout=240.0)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("world_size", "replicas"), SHAPES)
def test_means_have_the_bits_of_one_average_of_what_fsdp_has_scattered(
    world_size: int, replicas: int, name: str
) -> None:
    start = RUNS[name][0].get("start_step", 0)
    for rank, found in enumerate(seen(world_size, replicas)):
        means, right = found[name].means, found["expected"][name]
        same = [bits(list(step.values())) == right[i] for i, step in enumerate(means)][start:]
        own = [float(sum(g.float().norm() for g in step.values())) for step in found[name].own]
        assert all(same), (rank, same, own, found[name].stats)


@pytest.mark.parametrize(("world_size", "replicas"), SHAPES)
def test_replicas_stay_equal_and_a_resumed_run_is_the_uninterrupted_one(world_size: int, replicas: int) -> None:
    ranks, shards = seen(world_size, replicas), world_size // replicas
    for rank, found in enumerate(ranks):
        differing = [name for name in RUNS if found[name].params != ranks[rank % shards][name].params]
        assert not differing, (rank, differing)
        resumed, whole = found["resumed"], found["1 bit"]
        assert resumed.params == whole.params, [a == b for a, b in zip(resumed.params, whole.params, strict=True)]
        assert state_bits(resumed.states[-1]) == state_bits(whole.states[-1])


@pytest.mark.parametrize(("world_size", "replicas"), SHAPES)
def test_fp32_averages_are_those_of_fsdp_and_micro_batches_are_averaged_once(world_size: int, replicas: int) -> None:
    for found in seen(world_size, replicas):
        assert found["native"] < 1e-6, found["native"]  # sums of 4 numbers in fp32, in another order
        off, calls = found["accumulated"]
        assert off < 1e-5, off  # products of half the rows, summed in another order
        assert calls == 3


@pytest.mark.parametrize(("world_size", "replicas"), SHAPES)
def test_steps_that_the_host_does_not_wait_for_are_those_that_it_does(world_size: int, replicas: int) -> None:
    for rank, found in enumerate(seen(world_size, replicas)):
        ahead, waiting = (torch.frombuffer(bytearray(run), dtype=torch.float32) for run in found["unwatched"])
        assert bool(waiting.isfinite().all())
        assert torch.equal(ahead, waiting), (rank, float((ahead - waiting).abs().max()))


def scattered(backend: Backend) -> dict[str, Any]:
    mesh = init_device_mesh("cuda", (backend.size,), mesh_dim_names=("shard",))
    runs = {"1 bit": None, "8 bits": Int8Codec()}
    found: dict[str, Any] = {
        name: train(mesh, functools.partial(compress_reduce_scatter, codec=codec), sharding=mesh, device="cuda")
        for name, codec in runs.items()
    }
    return on_host(found)


def test_scattered_means_and_what_ranks_hold_are_what_was_given() -> None:
    ranks = run_ranks("nccl", 2, scattered, timeout=240.0)
    for name in ("1 bit", "8 bits"):
        runs: list[Seen] = [rank[name] for rank in ranks]
        for module in runs[0].states[-1]["modules"]:
            residuals = [run.states[-1]["modules"][module]["residual"] for run in runs]
            held = torch.stack([state["worker"].double() for state in residuals]).mean(0)
            parts = list(torch.split(held, residuals[0]["numels"]))
            names = [n for n in runs[0].own[0] if n.startswith(f"{module}." if module else ("first", "gain", "last"))]
            names = sorted(names, key=lambda one: one == "gain")
            for shard, run in enumerate(runs):
                for index, one in enumerate(names):
                    exact = torch.stack([step[one].double().reshape(-1) for step in run.own]).sum(0)
                    said = torch.stack([step[one].double().reshape(-1) for step in run.means]).sum(0)
                    left = parts[shard * len(names) + index][: exact.numel()]
                    off = (exact - said - left).abs().max().item() if exact.numel() else 0.0
                    largest = max(
                        [float(g[one].abs().max()) for g in (*run.own, *run.means) if g[one].numel()] or [0.0]
                    )
                    assert off <= 1e-5 * largest, (name, module, one, off, largest)  # sums of fp32 in each step
        assert all(run.stats[0] > 0 for run in runs)
