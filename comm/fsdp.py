"""Gradients of models in `fully_shard` (FSDP2) averaged compressed: over replicas, or within the sharding itself."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from onebit.comm.agreement import agree
from onebit.comm.backend import Backend
from onebit.comm.bucket_size import bucket_mb_for
from onebit.comm.fsdp_hooks import UnitHooks
from onebit.comm.fsdp_replicas import ReplicaHook
from onebit.comm.fsdp_scatter import ScatterHook
from onebit.comm.fsdp_units import Unit, find_units
from onebit.comm.registry import make_backend
from onebit.compress.codec import Codec, as_codec
from onebit.compress.errors import InputError

__all__ = ["UnitHooks", "compress_gradients", "compress_reduce_scatter"]

_log = logging.getLogger(__name__)
_averaged: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_scattered: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compress_gradients(
    model: nn.Module,
    replicate: object,
    codec: Codec | None = None,
    *,
    start_step: int = 0,
    bucket_mb: float | None = None,
) -> UnitHooks:
    """Average a sharded model's gradients over its replicas, compressed, with error feedback; collective.

    For hybrid sharding (HSDP): inside a node `fully_shard` shards the model, and nodes hold replicas of it. FSDP is
    given the inner dimension of the mesh alone, scatters gradients in it as always, and hands each unit's shard on, on
    a stream beside that of the next reduce-scatter. Only what is averaged between nodes is compressed, and this rank
    keeps 4 bytes of error feedback per element of its shards, and 4/n more with n replicas.

    FSDP calls for every backward pass that reduces gradients, so micro-batches are accumulated with
    ``model.set_requires_gradient_sync(False)``; ``set_requires_all_reduce`` speaks of FSDP's own average over
    replicas and changes nothing here. A factor of ``set_gradient_divide_factor`` counts the ranks of the shard mesh
    alone. A number that is not finite makes the mean of its block NaN on every replica.

    Args:
        model: what `fully_shard` was applied to last, with ``mesh=mesh["shard"]`` for all of its modules. Parameters to
            be frozen are frozen already.
        replicate: the ranks that hold the same shard: the outer dimension of the mesh, ``mesh["replicate"]``, or a
            process group, communicator or Backend as `make_backend` takes it. Replicas hold the same
            parameters when training starts.
        codec: what goes on the wire.
        start_step: how many averages of every module come before the first compressed one; they are made in fp32.
        bucket_mb: MiB of fp32 of one unit that travel together; see `CompressedAllreduce`.

    Returns:
        The hooks, which have the error feedback to save and the counts of bytes.

    Raises:
        InputError: the model is of another kind, is compressed already or averages over replicas by itself, the group
            is not that of the replicas, an option is out of range, or PyTorch is older than 2.7; nothing was changed.
        MismatchError: replicas differ in modules, parameters, shards or options; raised on all of them.
        BackendError: the group cannot carry the model's gradients.
    """
    call = "compress_gradients"
    root = _free(model, _averaged, call, "set_all_reduce_hook", "2.7")
    if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
        raise InputError(f"{call}: start_step must be an int of at least 0, got {start_step!r}")
    bucket_mb = None if bucket_mb is None else bucket_mb_for([], bucket_mb)
    codec = as_codec(codec)
    units = find_units(model, call)
    backend = _replicas(replicate, units, call)
    facts = {"codec": str(codec), "start_step": str(start_step), "the number of modules": str(len(units))}
    for unit in units:
        facts[f"module {unit.name!r}"] = f"shard {unit.shard} of {unit.shards}, " + ", ".join(
            f"{piece.parameter}: {piece.room}" for piece in unit.pieces
        )
    agree(backend, call, facts)
    if backend.size == 1:
        _log.warning(
            "compress_gradients: the group of replicas has one rank, so nothing is averaged and nothing compressed"
        )
    return UnitHooks(root, [ReplicaHook(unit, backend, codec, start_step, bucket_mb) for unit in units], _averaged)


def compress_reduce_scatter(model: nn.Module, codec: Codec | None = None) -> UnitHooks:
    """Have FSDP scatter the mean of gradients compressed, with error feedback, in the place of its own reduce-scatter.

    For sharding over a slow network. Every rank keeps error feedback of the **whole** gradient, 4 bytes per parameter
    of the unsharded model, for that is what it sends: where the model does not fit a rank, shard inside of nodes and
    compress between them with `compress_gradients`. Parameters are gathered by FSDP, uncompressed.

    Args:
        model: what `fully_shard` was applied to last.
        codec: what goes on the wire; it has blocks.

    Returns:
        The hooks, which have the error feedback to save and the counts of bytes.

    Raises:
        InputError: the model is of another kind or compressed already, the codec has no blocks, or PyTorch is
            older than 2.9, which brought the extension point; nothing was changed.
        BackendError: FSDP's process group cannot carry the model's gradients with a transport of ours.
    """
    call = "compress_reduce_scatter"
    root = _free(model, _scattered, call, "set_custom_reduce_scatter", "2.9")
    codec = as_codec(codec)
    if codec.block_size is None:
        raise InputError(
            f"{call}: every rank's shard is encoded in blocks of its own; got {codec}; give it a block_size"
        )
    units = find_units(model, call)
    device = units[0].mesh.device_type if units else "cpu"
    backends: dict[object, Backend] = {}
    for unit in units:
        group = unit.mesh.get_group(0)
        backends.setdefault(group, make_backend(group, device=device))
    return UnitHooks(root, [ScatterHook(unit, backends[unit.mesh.get_group(0)], codec) for unit in units], _scattered)


def _free(model: nn.Module, taken: weakref.WeakSet[nn.Module], call: str, needed: str, since: str) -> nn.Module:
    """The root, if this way of compressing is there and not in use."""
    if not hasattr(FSDPModule, needed):
        raise InputError(
            f"{call} needs FSDPModule.{needed}, which PyTorch {torch.__version__} does not have; install "
            f"PyTorch {since} or newer"
        )
    root: nn.Module = model if isinstance(model, FSDPModule) else getattr(model, "_orig_mod", model)
    if root in taken:
        raise InputError(
            f"{call}: this model's gradients are compressed already; detach() the hooks that are there first"
        )
    return root


def _replicas(replicate: object, units: Sequence[Unit], call: str) -> Backend:
    """The backend of the replicas, if it is a group of ranks none of which hold other shards of this replica."""
    if replicate is None:
        raise InputError(
            f'{call}: replicate is needed: mesh["replicate"], the dimension of the mesh over which nothing is sharded'
        )
    if isinstance(replicate, DeviceMesh):
        if replicate.ndim != 1:
            raise InputError(
                f"{call}: replicate is a mesh of {replicate.ndim} dimensions, {replicate.mesh_dim_names}; give the "
                'one over which the model is not sharded, such as mesh["replicate"]'
            )
        replicate = replicate.get_group()
    backend = make_backend(replicate, device=units[0].mesh.device_type if units else None)
    group = getattr(backend, "group", None)
    if isinstance(group, dist.ProcessGroup):
        replicas = set(dist.get_process_group_ranks(group)) - {dist.get_rank()}
        for unit in units:
            both = sorted(replicas & set(unit.mesh.mesh.flatten().tolist()))
            if both:
                raise InputError(
                    f"rank {dist.get_rank()}: {call}: rank {both[0]} is in the group of replicas and in the shard mesh "
                    f"of module {unit.name!r}, so it holds another shard; give the outer dimension of the mesh as "
                    'replicate=mesh["replicate"], and mesh=mesh["shard"] to every fully_shard'
                )
    return backend
