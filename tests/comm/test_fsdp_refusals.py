"""What a newcomer to onebit.comm.fsdp gets wrong raises on every rank, changes nothing and names the mend."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from onebit.comm import Backend, MismatchError, OnebitError
from onebit.comm.fsdp import compress_gradients, compress_reduce_scatter
from onebit.compress import SignCodec
from tests.comm.fsdp_runs import backward, data, hybrid_mesh, net, sharded
from tests.comm.launcher import run_ranks


def plain(mesh: Any) -> None:
    compress_gradients(net(), mesh["replicate"])


def in_ddp(mesh: Any) -> None:
    compress_gradients(DistributedDataParallel(net()), mesh["replicate"])


def in_fsdp1(mesh: Any) -> None:
    compress_gradients(FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")), mesh["replicate"])


def root_forgotten(mesh: Any) -> None:
    model = net()
    fully_shard(model.blocks[0], mesh=mesh["shard"])
    compress_gradients(model, mesh["replicate"])


def two_dimensions(mesh: Any) -> None:
    compress_gradients(sharded(mesh), mesh["replicate"])


def one_block_of_two_dimensions(mesh: Any) -> None:
    model = net()
    fully_shard(model.blocks[1], mesh=mesh)
    compress_gradients(fully_shard(model, mesh=mesh["shard"]), mesh["replicate"])


def twice(mesh: Any) -> None:
    model = sharded(mesh["shard"])
    compress_gradients(model, mesh["replicate"])
    compress_gradients(model, mesh["replicate"])


def scattered_twice(mesh: Any) -> None:
    model = sharded(mesh["shard"])
    compress_reduce_scatter(model)
    compress_reduce_scatter(model)


def no_group(mesh: Any) -> None:
    compress_gradients(sharded(mesh["shard"]), None)


def whole_mesh(mesh: Any) -> None:
    compress_gradients(sharded(mesh["shard"]), mesh)


def shard_group(mesh: Any) -> None:
    compress_gradients(sharded(mesh["shard"]), mesh.get_group("shard"))


def all_ranks(mesh: Any) -> None:
    compress_gradients(sharded(mesh["shard"]), dist.group.WORLD)


def negative_start(mesh: Any) -> None:
    compress_gradients(sharded(mesh["shard"]), mesh["replicate"], start_step=-1)


def no_codec(mesh: Any) -> None:
    compress_gradients(sharded(mesh["shard"]), mesh["replicate"], "int8")  # type: ignore[arg-type]


def scatter_without_blocks(mesh: Any) -> None:
    compress_reduce_scatter(sharded(mesh["shard"]), SignCodec(block_size=None))


def other_options(mesh: Any) -> None:
    compress_gradients(sharded(mesh["shard"]), mesh["replicate"], start_step=mesh.get_local_rank("replicate"))


def other_shards(mesh: Any) -> None:
    """Replicas whose ranks hold shards in another order."""
    ranks = torch.arange(4).view(2, 2)
    crossed = torch.stack([ranks[0], ranks[1].flip(0)])
    groups = [dist.new_group(crossed[:, i].tolist()) for i in range(2)]
    mine = next(i for i in range(2) if dist.get_rank() in crossed[:, i].tolist())
    compress_gradients(sharded(mesh["shard"]), groups[mine])


def state_of_another_shard(mesh: Any) -> None:
    model = sharded(mesh["shard"])
    hooks = compress_gradients(model, mesh["replicate"])
    backward(model, data(dist.get_rank(), 0))
    state = hooks.state_dict()
    hooks.load_state_dict({**state, "shard": 1 - state["shard"]})


def state_of_other_modules(mesh: Any) -> None:
    hooks = compress_gradients(sharded(mesh["shard"]), mesh["replicate"])
    hooks.load_state_dict(compress_gradients(fully_shard(net(), mesh=mesh["shard"]), mesh["replicate"]).state_dict())


def no_state(mesh: Any) -> None:
    compress_gradients(sharded(mesh["shard"]), mesh["replicate"]).load_state_dict({"worker": 1})


def state_of_other_buckets(mesh: Any) -> None:
    models = [sharded(mesh["shard"]) for _ in range(2)]
    first, second = (
        compress_gradients(model, mesh["replicate"], bucket_mb=bucket_mb)
        for model, bucket_mb in zip(models, (0.004, None), strict=True)
    )
    backward(models[0], data(dist.get_rank(), 0))
    second.load_state_dict(first.state_dict())
    backward(models[1], data(dist.get_rank(), 0))


def old_torch(mesh: Any) -> None:
    model = sharded(mesh["shard"])
    kept = FSDPModule.set_custom_reduce_scatter
    del FSDPModule.set_custom_reduce_scatter  # type: ignore[misc]
    try:
        compress_reduce_scatter(model)
    finally:
        FSDPModule.set_custom_reduce_scatter = kept  # type: ignore[method-assign]


MISTAKES: dict[Any, tuple[str, ...]] = {
    plain: ("got Net", "call torch.distributed.fsdp.fully_shard on its blocks"),
    in_ddp: ("DistributedDataParallel", "onebit.comm.ddp.compress_gradients(model)"),
    in_fsdp1: ("FSDP1", "fully_shard to the unwrapped model"),
    root_forgotten: ("'blocks.0' is the first", "call fully_shard(model, mesh=...) last"),
    two_dimensions: ("FSDP itself averages", 'mesh=mesh["shard"]', 'replicate=mesh["replicate"]'),
    one_block_of_two_dimensions: ("'blocks.1.0.weight'", 'mesh=mesh["shard"]'),
    twice: ("compressed already", "detach()"),
    scattered_twice: ("compressed already", "detach()"),
    no_group: ("replicate is needed", 'mesh["replicate"]'),
    whole_mesh: ("2 dimensions", 'mesh["replicate"]'),
    shard_group: ("in the shard mesh", 'replicate=mesh["replicate"]'),
    all_ranks: ("in the shard mesh", 'replicate=mesh["replicate"]'),
    negative_start: ("start_step must be an int of at least 0, got -1",),
    no_codec: ("must be a Codec",),
    scatter_without_blocks: ("blocks of its own", "block_size"),
    other_options: ("start_step", "rank 0: 0; rank 1: 1"),
    other_shards: ("shard 0 of 2", "shard 1 of 2"),
    state_of_another_shard: ("of shard", "every rank loads the state that it has saved"),
    state_of_other_modules: ("1 modules, here are 3", "'blocks.0'"),
    no_state: ("was it made by state_dict()?",),
    state_of_other_buckets: ("another bucket size", "use the old options"),
    old_torch: ("FSDPModule.set_custom_reduce_scatter", "install PyTorch 2.9 or newer"),
}
OTHER_KINDS = {other_options: MismatchError, other_shards: MismatchError}


def all_mistakes(backend: Backend) -> dict[str, tuple[type[Exception] | None, str]]:
    mesh, found = hybrid_mesh(), {}
    for mistake in MISTAKES:
        try:
            mistake(mesh)
            found[mistake.__name__] = (None, "no error")
        except Exception as error:
            found[mistake.__name__] = (type(error), str(error))
    model = sharded(mesh["shard"])
    compress_gradients(model, mesh["replicate"])
    backward(model, data(backend.rank, 0))  # no collective of a mistake is left over
    return found


@functools.cache
def seen() -> list[dict[str, tuple[type[Exception] | None, str]]]:
    return run_ranks("gloo", 4, all_mistakes, timeout=120.0)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_an_error_on_every_rank_that_names_the_mend(mistake: Any) -> None:
    for rank in seen():
        kind, message = rank[mistake.__name__]
        assert kind is not None, message
        assert issubclass(kind, OTHER_KINDS.get(mistake, OnebitError)), (kind, message)
        for part in MISTAKES[mistake]:
            assert part in message, message


def refused_by_fsdp(backend: Backend) -> tuple[str, bool]:
    """FSDP refuses the second module's hook: that of the first is taken off again."""
    mesh = hybrid_mesh()
    model = sharded(mesh["shard"])
    kept, calls = FSDPModule.set_all_reduce_hook, []

    def refusing(self: Any, hook: Any, **options: Any) -> None:
        calls.append(hook)
        if len(calls) == 2:
            raise ValueError("multiple param groups")
        kept(self, hook, **options)

    FSDPModule.set_all_reduce_hook = refusing  # type: ignore[method-assign]
    try:
        compress_gradients(model, mesh["replicate"])
        message = "no error"
    except OnebitError as error:
        message = str(error)
    finally:
        FSDPModule.set_all_reduce_hook = kept  # type: ignore[method-assign]
    compress_gradients(model, mesh["replicate"])
    return message, calls[-1] is None


def test_hooks_are_taken_off_again_where_fsdp_refuses_one() -> None:
    for message, taken_off in run_ranks("gloo", 2, refused_by_fsdp):
        assert "'blocks.0'" in message
        assert "over one mesh" in message
        assert taken_off
