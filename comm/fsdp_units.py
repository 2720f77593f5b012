"""What `fully_shard` reduces together: its units, and where their gradients lie in one flat tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from onebit.compress.errors import InputError
from onebit.compress.layout import ceil_div


@dataclass(frozen=True)
class Piece:
    """The gradient of one parameter in a rank's part of a unit's flat gradient.

    Attributes:
        parameter: its name in the model.
        start: its first element in the flat tensor.
        real: for each rank of the shard mesh, how many elements belong to the parameter; zeros that fill it up follow.
        room: how many elements it takes, the same on every rank.
    """

    parameter: str
    start: int
    real: tuple[int, ...]
    room: int


@dataclass(frozen=True, eq=False)
class Unit:
    """The trainable parameters that one call of `fully_shard` manages, whose gradients arrive in one flat tensor.

    Attributes:
        name: of its first module in the model; empty for the root.
        modules: those that the call was given.
        mesh: over which the parameters are sharded.
        pieces: the parameters, in the order of the flat tensor.
    """

    name: str
    modules: tuple[FSDPModule, ...]
    mesh: DeviceMesh
    pieces: tuple[Piece, ...]

    @property
    def module(self) -> FSDPModule:
        """One of its modules; what is set for it is set for the unit."""
        return self.modules[0]

    @property
    def shard(self) -> int:
        """This rank's number in the shard mesh, whose first dimension is that of `fully_shard`."""
        return int(self.mesh.get_local_rank(0))

    @property
    def shards(self) -> int:
        """In how many parts parameters are cut."""
        return int(self.mesh.size(0))

    @property
    def numel(self) -> int:
        """Elements of one rank's flat gradient."""
        return sum(piece.room for piece in self.pieces)

    def check(self, rank: int, flat: Tensor) -> None:
        """Raise InputError unless one rank's flat gradient is of all trainable parameters of the unit."""
        if flat.numel() != self.numel:
            raise InputError(
                f"rank {rank}: module {self.name!r}: FSDP reduces {flat.numel()} elements per rank, and the module's "
                f"{len(self.pieces)} trainable parameters have {self.numel}: one of them got no gradient, or was "
                "frozen or unfrozen since. Let every trainable parameter take part in the loss (where torch has it, "
                "call model.set_reduce_scatter_unused_params(True)), set requires_grad=False on those that do not, and "
                "after such a change call detach() and compress anew"
            )


def find_units(model: nn.Module, call: str) -> list[Unit]:
    """The units of a model with trainable parameters, in the order of the model.

    Args:
        model: what `fully_shard` was applied to last, or what torch.compile made of it.
        call: who asks, for messages.

    Raises:
        InputError: the model is of another kind, or its gradients are averaged by FSDP over more than one dimension.
    """
    root = _root(model, call)
    found: dict[int, list[tuple[str, FSDPModule]]] = {}
    for name, module in root.named_modules():
        if isinstance(module, FSDPModule):
            found.setdefault(id(_state(module)), []).append((name, module))
    names = {id(p): name for name, p in root.named_parameters()}
    units = [_unit(members, names, call) for members in found.values()]
    return [unit for unit in units if unit is not None]


def _root(model: nn.Module, call: str) -> nn.Module:
    if isinstance(model, FSDPModule):
        return model
    inner = getattr(model, "_orig_mod", model)  # where torch.compile keeps it
    if isinstance(inner, FSDPModule) and isinstance(inner, nn.Module):
        return inner
    if isinstance(inner, DistributedDataParallel):
        raise InputError(
            f"{call} takes a model of fully_shard, got a DistributedDataParallel one; for that there is "
            "onebit.comm.ddp.compress_gradients(model)"
        )
    if isinstance(inner, FullyShardedDataParallel):
        raise InputError(
            f"{call} takes a model of fully_shard (FSDP2), got a FullyShardedDataParallel one, which is FSDP1; apply "
            "torch.distributed.fsdp.fully_shard to the unwrapped model instead"
        )
    nested = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    if nested:
        raise InputError(
            f"{call}: modules inside of this {type(model).__name__} are sharded ({nested[0]!r} is the first), and it "
            "is not itself: nobody would average its other parameters; call fully_shard(model, mesh=...) last, and "
            "give that model"
        )
    raise InputError(
        f"{call} takes a model of fully_shard, got {type(model).__name__}; call torch.distributed.fsdp.fully_shard on "
        "its blocks and then on the model itself, with a mesh of one dimension, before this"
    )


def _state(module: FSDPModule) -> Any:
    """What modules that were given to one call of `fully_shard` have in common."""
    return fully_shard.state(module) or module  # type: ignore[attr-defined]


def _unit(members: Sequence[tuple[str, FSDPModule]], names: dict[int, str], call: str) -> Unit | None:
    name, first = members[0]
    modules = tuple(module for _, module in members)
    given = getattr(_state(first), "_modules", None) or modules  # in the order of the call, where FSDP tells
    params = [p for p in _own_parameters(given) if isinstance(p, DTensor) and p.requires_grad]
    if not params:
        return None
    pieces, start = [], 0
    for p in params:
        pieces.append(_piece(p, names.get(id(p), "a parameter"), start, call))
        start += pieces[-1].room
    return Unit(name, modules, params[0].device_mesh, tuple(pieces))


def _own_parameters(modules: Sequence[Any]) -> Iterator[nn.Parameter]:
    """Parameters of modules and of those in them that are no units of their own: children first, as FSDP has them."""
    seen: set[Any] = set()

    def walk(module: nn.Module) -> Iterator[nn.Parameter]:
        seen.add(module)
        for child in module.children():
            if child not in seen and not isinstance(child, FSDPModule):
                yield from walk(child)
        for p in module.parameters(recurse=False):
            if p not in seen:
                seen.add(p)
                yield p

    for module in modules:
        yield from walk(module)


def _piece(p: DTensor, name: str, start: int, call: str) -> Piece:
    mesh, placement = p.device_mesh, p.placements[0]
    if isinstance(placement, Replicate):
        raise InputError(
            f"{call}: parameter {name!r} is replicated over the first dimension of its mesh {_shown(p)}, so FSDP "
            "itself averages gradients over it before it asks anybody; shard over the inner dimension alone, "
            'fully_shard(module, mesh=mesh["shard"]) for every module, and give the outer one here: '
            'replicate=mesh["replicate"]'
        )
    shards, local = int(mesh.size(0)), p.to_local()
    if mesh.ndim > 1 or not isinstance(placement, Shard) or placement.dim != 0 or not p.dim():
        # Such shards are equal, as FSDP demands for dimensions but the first, or what comes is found to differ.
        return Piece(name, start, (local.numel(),) * shards, local.numel())
    rows, row = int(p.shape[0]), p.numel() // max(int(p.shape[0]), 1)
    most = ceil_div(rows, shards)
    real = tuple(min(max(rows - shard * most, 0), most) * row for shard in range(shards))
    return Piece(name, start, real, most * row)


def _shown(p: DTensor) -> str:
    return f"{tuple(p.device_mesh.mesh_dim_names or p.device_mesh.shape)}"
