"""onebit.comm.fsdp.compress_gradients: shards of FSDP2 averaged compressed over replicas, on 2 x 2 and 2 x 1 ranks."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from onebit.comm import Backend, CompressedAllreduce, Residual
from onebit.comm.fsdp import compress_gradients
from onebit.compress import Int8Codec, SignCodec
from tests.comm import oracle
from tests.comm.fsdp_runs import (
    STEPS,
    Grads,
    Seen,
    backward,
    data,
    gradients,
    hybrid_mesh,
    local,
    net,
    over_replicas,
    sharded,
    train,
)
from tests.comm.launcher import run_ranks
from tests.comm.samples import arrays, bits, state_bits, worker_parts

pytestmark = pytest.mark.slow

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of compress_gradients, and of the run
    "1 bit": ({}, {}),
    "resumed": ({}, {"resume_at": 3}),
    "small buckets": ({"bucket_mb": 0.004}, {}),
    "gathered once": ({}, {"reshard_after_forward": False}),
    "8 bits": ({"codec": Int8Codec()}, {}),
    "one scale": ({"codec": SignCodec(block_size=None)}, {}),
    "warm-up": ({"start_step": 2}, {}),
    "warm-up resumed": ({"start_step": 2}, {"resume_at": 1}),
    "bf16": ({}, {"mp_policy": BF16}),
}
REPLICAS = 2


def all_runs(backend: Backend) -> dict[str, Seen]:
    mesh = hybrid_mesh()
    return {name: train(mesh, over_replicas(mesh, **options), **run) for name, (options, run) in RUNS.items()}


@functools.cache
def seen(world_size: int) -> list[dict[str, Seen]]:
    return run_ranks("gloo", world_size, all_runs, timeout=240.0)


def averages(backend: Backend, per_rank: list[dict[str, list[Grads]]]) -> dict[str, list[list[bytes]]]:
    """What one average of the plain shards of a run has, step by step."""
    mesh, found = hybrid_mesh(), {}
    for name, own in per_rank[backend.rank].items():
        options = RUNS[name][0]
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        steps = [[g.to(dtype) for g in step.values()] for step in own]
        reduce = CompressedAllreduce(steps[0], mesh.get_group("replicate"), options.get("codec"))
        for step in steps[options.get("start_step", 0) :]:
            reduce(step)
        found[name] = [bits([g.float() for g in step]) for step in steps]
    return found


@functools.cache
def expected(world_size: int) -> list[dict[str, list[list[bytes]]]]:
    own = [{name: run.own for name, run in rank.items()} for rank in seen(world_size)]
    return run_ranks("gloo", world_size, averages, own, timeout=120.0)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_means_have_the_bits_of_one_average_of_what_fsdp_has_scattered(world_size: int, name: str) -> None:
    start = RUNS[name][0].get("start_step", 0)
    for rank, right in zip(seen(world_size), expected(world_size), strict=True):
        assert [bits(list(step.values())) for step in rank[name].means[start:]] == right[name][start:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_means_are_those_of_the_definition_in_float64(world_size: int) -> None:
    shards = world_size // REPLICAS
    for shard in range(shards):
        runs = [seen(world_size)[replica * shards + shard]["1 bit"] for replica in range(REPLICAS)]
        names = list(runs[0].own[0])
        average = oracle.CompressedMean(REPLICAS, [runs[0].own[0][name].numel() for name in names])
        for number in range(STEPS):
            given = [arrays(list(run.own[number].values())) for run in runs]
            means = average(given)
            for run in runs:
                for name, mine, right in zip(names, arrays(list(run.means[number].values())), means, strict=True):
                    largest = max([1e-30, *(np.abs(x).max(initial=0) for x in (mine, right))])
                    # fp32 has rounded a residual and a scale once in each step so far; no sign was that near to 0.
                    off = np.abs(mine - right).max(initial=0)
                    assert off <= 8 * (number + 1) * oracle.UNIT * largest, (name, number, off, average.closest)


@pytest.mark.parametrize("name", ["1 bit", "8 bits", "one scale", "resumed", "warm-up"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_what_was_given_has_been_said_or_is_held(world_size: int, name: str) -> None:
    shards = world_size // REPLICAS
    for shard in range(shards):
        runs = [seen(world_size)[replica * shards + shard][name] for replica in range(REPLICAS)]
        before: Any = dict.fromkeys(runs[0].states[0]["modules"], 0.0)
        for number in range(STEPS):
            for module in before:
                after = held([run.states[number]["modules"][module]["residual"] for run in runs])
                names = members(module, list(runs[0].own[number]))
                own = torch.stack([flat(run.own[number], names) for run in runs]).mean(0)
                said = flat(runs[0].means[number], names)
                scale = float(torch.cat([own, said, after]).abs().max())
                off = float((own + before[module] - said - after).abs().max())
                assert off <= scale * 2.0**-21, (module, number, off, scale)  # each is rounded to fp32 once or twice
                before[module] = after
        assert all(float(left.abs().max()) > 0 for left in before.values())


def members(module: str, names: list[str]) -> list[str]:
    """The parameters of a module, in the order in which FSDP lays them out: a module's children before its own."""
    if module:
        return [name for name in names if name.startswith(f"{module}.")]
    outer = [name for name in names if not name.startswith("blocks.")]
    return sorted(outer, key=lambda name: name == "gain")


def flat(grads: Grads, names: list[str]) -> Tensor:
    return torch.cat([grads[name].double().reshape(-1) for name in names])


def held(states: list[dict[str, Any]]) -> Tensor:
    """What replicas together have not said yet: the mean of the workers' feedback, and the servers'."""
    if all("worker" not in state for state in states):
        return torch.zeros(1, dtype=torch.float64)
    (one,) = Residual.reshard(states, 1)
    left: Tensor = one["worker"].double() + one["server"].double()
    return left


@pytest.mark.parametrize("world_size", [2, 4])
def test_feedback_is_of_real_elements_alone(world_size: int) -> None:
    for rank in seen(world_size):
        for module, entry in rank["1 bit"].states[-1]["modules"].items():
            names = members(module, list(rank["1 bit"].own[0]))
            assert [part.size for part in worker_parts(entry["residual"])] == [
                rank["1 bit"].own[0][name].numel() for name in names
            ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_replicas_stay_equal(world_size: int) -> None:
    shards = world_size // REPLICAS
    for name in RUNS:
        for shard in range(shards):
            first, other = (seen(world_size)[replica * shards + shard][name] for replica in range(REPLICAS))
            assert first.params == other.params, name


@pytest.mark.parametrize(("name", "whole"), [("resumed", "1 bit"), ("warm-up resumed", "warm-up")])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, whole: str) -> None:
    for rank in seen(4):
        assert rank[name].params == rank[whole].params
        assert state_bits(rank[name].states[-1]) == state_bits(rank[whole].states[-1])


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_sent_are_those_of_the_formula(world_size: int) -> None:
    for rank in seen(world_size):
        run = rank["1 bit"]
        sizes = [
            [run.own[0][name].numel() for name in members(module, list(run.own[0]))]
            for module in run.states[0]["modules"]
        ]
        assert len(sizes) == 3
        wire = sum(oracle.wire_bytes(REPLICAS, numels) for numels in sizes)
        assert run.stats == (STEPS * wire, STEPS * 4 * sum(map(sum, sizes)), STEPS * 3)


class Signs(nn.Module):
    """Its gradient is one number times signs, which a scale per block says wholly."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("signs", torch.randn(64, 48, generator=torch.Generator().manual_seed(4)).sign())
        self.weight = nn.Parameter(self.signs.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * self.signs).sum() * x


def others(backend: Backend) -> dict[str, Any]:
    """What needs no run of its own kind."""
    mesh = hybrid_mesh()
    return {
        "warm-up": beside_native(mesh, net, data(backend.rank, 0), start_step=1),
        "lossless": beside_native(mesh, Signs, torch.tensor(backend.rank + 1.0)),
        "accumulated": [accumulate(mesh, pieces) for pieces in (4, 1)],
        "saved": saved(mesh, backend.rank),
        "together": together(mesh, backend.rank),
        "unused": unused(mesh, backend.rank),
        "bad": bad_number(mesh, backend.rank),
        "rescaled": rescaled(mesh, backend.rank),
        "compiled": compiled(mesh, backend.rank),
        "detached": detached(mesh, backend.rank),
        "alone": alone(backend.rank),
    }


@functools.cache
def seen_others() -> list[dict[str, Any]]:
    return run_ranks("gloo", 4, others, timeout=240.0)


def beside_native(mesh: Any, make: Any, x: Tensor, **options: Any) -> list[list[bytes]]:
    """Gradients of FSDP's own average over replicas, and ours."""
    found = []
    for native in (True, False):
        model = fully_shard(make(), mesh=mesh if native else mesh["shard"])
        if not native:
            compress_gradients(model, mesh["replicate"], **options)
        backward(model, x)
        found.append(bits(list(gradients(model).values())))
    return found


@pytest.mark.parametrize("name", ["warm-up", "lossless"])
def test_what_is_not_rounded_has_the_bits_of_fsdps_own_average(name: str) -> None:
    for rank in seen_others():
        native, ours = rank[name]
        assert ours == native


def accumulate(mesh: Any, pieces: int) -> list[bytes]:
    """Small whole numbers, whose sums are exact: 4 batches of 1, or 1 of 4."""
    model = nn.Linear(64, 32, bias=False)
    nn.init.zeros_(model.weight)
    fully_shard(model, mesh=mesh["shard"])
    hooks = compress_gradients(model, mesh["replicate"])
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        *first, last = torch.randint(-8, 8, (4, 64), generator=generator).float().chunk(pieces)
        model.zero_grad()
        model.set_requires_gradient_sync(False)
        for part in first:
            model(part).sum().backward()
        model.set_requires_gradient_sync(True)
        model(last).sum().backward()
        with torch.no_grad():
            model.weight.sub_(0.5 * model.weight.grad)
    assert hooks.stats.calls == 3
    return bits(local(model.weight))


def test_micro_batches_equal_one_batch_and_are_averaged_once() -> None:
    for rank in seen_others():
        in_pieces, at_once = rank["accumulated"]
        assert in_pieces == at_once


def saved(mesh: Any, rank: int) -> bool:
    """Whether a state comes back from a file of tensors alone."""
    model = sharded(mesh["shard"])
    hooks = compress_gradients(model, mesh["replicate"])
    backward(model, data(rank, 0))
    file = io.BytesIO()
    torch.save(hooks.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    hooks.load_state_dict(state)
    return bool(state_bits(hooks.state_dict()) == state_bits(state))


def test_a_state_can_be_saved() -> None:
    assert all(rank["saved"] for rank in seen_others())


def together(mesh: Any, rank: int) -> tuple[list[str], bool]:
    """Two modules that are one unit, given in another order than that of the model."""
    model, twin = net(), sharded(mesh["shard"])
    fully_shard([model.last, model.first], mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    hooks = compress_gradients(model, mesh["replicate"], start_step=1)
    compress_gradients(twin, mesh["replicate"], start_step=1)
    for _ in range(2):
        backward(model, data(rank, 0))
        backward(twin, data(rank, 0))
    return list(hooks.modules), bits(list(gradients(model).values())) == bits(list(gradients(twin).values()))


def test_modules_sharded_together_are_one_unit_and_a_units_neighbours_change_nothing() -> None:
    assert [rank["together"] for rank in seen_others()] == [(["", "first"], True)] * 4


def unused(mesh: Any, rank: int) -> str:
    """A parameter that no rank uses."""
    model = net()
    model.idle = nn.Linear(3, 3)
    fully_shard(model, mesh=mesh["shard"])
    compress_gradients(model, mesh["replicate"])
    return message_of(lambda: backward(model, data(rank, 0)))


def message_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_parameter_without_gradient_is_an_error_that_says_what_to_do() -> None:
    for rank, found in enumerate(seen_others()):
        for part in (f"InputError: rank {rank // 2}: module ''", "got no gradient", "requires_grad=False", "detach()"):
            assert part in found["unused"], found["unused"]


def bad_number(mesh: Any, rank: int) -> list[bool]:
    """Whether gradients are finite, in steps of which one has an infinity on one rank."""
    model = sharded(mesh["shard"])
    compress_gradients(model, mesh["replicate"])
    finite = []
    for number in range(4):
        x = data(rank, number)
        if number == 2 and rank == 3:
            x[0, 0] = torch.inf
        backward(model, x)
        finite.append(all(bool(g.isfinite().all()) for g in gradients(model).values()))
    return finite


def test_a_bad_number_reaches_all_ranks_and_no_later_step() -> None:
    assert [rank["bad"] for rank in seen_others()] == [[True, True, False, True]] * 4


def rescaled(mesh: Any, rank: int) -> bool:
    """A loss scale that doubles at the third step changes nothing but the scale, a power of two."""
    found = []
    for doubled in (1.0, 2.0):
        model = sharded(mesh["shard"])
        hooks = compress_gradients(model, mesh["replicate"])
        for number in range(4):
            if number == 2:
                hooks.rescale(doubled)
            model.zero_grad()
            (model(data(rank, number)).square().mean() * (doubled if number >= 2 else 1.0)).backward()
        found.append(bits([g / doubled for g in gradients(model).values()]))
    return found[0] == found[1]


def test_feedback_follows_the_loss_scale() -> None:
    assert all(rank["rescaled"] for rank in seen_others())


def compiled(mesh: Any, rank: int) -> bool:
    """A model that torch.compile has wrapped takes the hooks of the one inside."""
    found = []
    for wrap in (False, True):
        model = sharded(mesh["shard"])
        called = torch.compile(model, backend="eager") if wrap else model
        compress_gradients(called, mesh["replicate"])
        backward(model, data(rank, 0))
        found.append(bits(list(gradients(model).values())))
    return found[0] == found[1]


def test_a_compiled_model_is_the_model_inside() -> None:
    assert all(rank["compiled"] for rank in seen_others())


def detached(mesh: Any, rank: int) -> tuple[bool, bool]:
    """Whether a detached model has the gradients of FSDP alone, and can be compressed again."""
    model, plain = sharded(mesh["shard"]), sharded(mesh["shard"])
    hooks = compress_gradients(model, mesh["replicate"])
    backward(model, data(rank, 0))
    hooks.detach()
    backward(model, data(rank, 1))
    backward(plain, data(rank, 1))
    alike = bits(list(gradients(model).values())) == bits(list(gradients(plain).values()))
    again = compress_gradients(model, mesh["replicate"])
    again.load_state_dict(hooks.state_dict())
    return alike, bool(state_bits(again.state_dict()) == state_bits(hooks.state_dict()))


def test_detached_hooks_leave_the_model_to_fsdp_and_their_state_to_the_next() -> None:
    assert [rank["detached"] for rank in seen_others()] == [(True, True)] * 4


def alone(rank: int) -> tuple[bool, int, int]:
    """One replica of all ranks."""
    mesh = hybrid_mesh(replicas=1)
    model, plain = sharded(mesh["shard"]), sharded(mesh["shard"])
    hooks = compress_gradients(model, mesh["replicate"])
    for one in (model, plain):
        backward(one, data(rank, 0))
    alike = bits(list(gradients(model).values())) == bits(list(gradients(plain).values()))
    return alike, hooks.stats.wire_bytes, hooks.stats.collectives


def test_one_replica_compresses_nothing() -> None:
    assert [rank["alone"] for rank in seen_others()] == [(True, 0, 0)] * 4
