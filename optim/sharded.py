"""An optimizer's state as named tensors, for one checkpoint of all ranks through ``torch.distributed.checkpoint``.

    import torch.distributed.checkpoint as dcp

    dcp.save({"model": model.state_dict(), "optimizer": sharded.tensors_of(optimizer)}, checkpoint_id=folder)

    sizes = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {"model": model.state_dict(), "optimizer": sharded.room_for(optimizer, sizes, prefix="optimizer.")}
    dcp.load(state, checkpoint_id=folder)
    sharded.load(optimizer, state["optimizer"])

What all ranks have in common is written once, error feedback once per rank. There are only tensors, which DCP reads
with ``weights_only``; its own list of them, ``.metadata``, it unpickles: read no folder that you do not trust.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.compress import InputError
from onebit.optim.base import CompressedOptimizer
from onebit.optim.checkpoint import resume
from onebit.optim.elastic import reshard
from onebit.optim.local_steps import RATE
from onebit.optim.state_keys import EXTRA, PER_RANK_IN_INTERVAL, RESIDUALS, SLICES

_RANK = re.compile(r"rank(\d+)\.")
_REST, _COMMON, _FEEDBACK, _PARAMETER, _OF = "rest", "common", "feedback", "parameter", "of."
_WHOLE, _NO_FEEDBACK = "whole", "none"


def tensors_of(optimizer: CompressedOptimizer) -> dict[str, Tensor]:
    """Return what this rank gives to a checkpoint of all ranks; no collective.

    Names: ``common.<parameter>.<key>``, the same on all ranks; ``rank<r>.<...>``, of this rank alone: error feedback,
    what it has a slice of with ``shard=True``, between synchronisations of 0/1 Adam momenta and parameters, and
    ``rank<r>.rest``, uint8, what is small. With `local_group` the name ``rank<r>.of.<...>`` tells which node and slice.

    Returns:
        Tensors on the parameters' device; some share memory with the optimizer, so save them before its next step.
    """
    state = optimizer.state_dict()
    own = f"rank{optimizer.backend.rank}."
    named: dict[str, Tensor] = {}
    sliced = SLICES in state[EXTRA]
    if optimizer._local_group is not None:
        named[own + _OF + _part_saved(optimizer, state)] = torch.zeros(1, dtype=torch.uint8)
    for place, entry, key in _tensors_in(state):
        common = place[0] == "state" and not sliced and not (RATE in entry and key in PER_RANK_IN_INTERVAL)
        named[(f"{_COMMON}." if common else own) + ".".join((*place[1:], key))] = entry.pop(key)
    rest = io.BytesIO()
    torch.save({"world_size": optimizer.backend.size, "state": state}, rest)
    named[own + _REST] = torch.frombuffer(bytearray(rest.getvalue()), dtype=torch.uint8)
    for index, p in _apart(optimizer, state):
        named[f"{own}{_PARAMETER}.{index}"] = p.detach()
    return named


def room_for(optimizer: CompressedOptimizer, sizes: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return empty CPU tensors for what this rank must read; with as many ranks as there were, that is its own alone.

    With `local_group` it is collective, and where nodes or slices are others it is everything, as for other ranks.

    Args:
        optimizer: which will load them.
        sizes: ``state_dict_metadata`` of the checkpoint: by name what has a ``size`` and ``properties.dtype``.
        prefix: what stands before our names there, such as ``"optimizer."``.

    Raises:
        InputError: there is nothing of `tensors_of` under this prefix, or ranks are missing.
    """
    names = [name.removeprefix(prefix) for name in sizes if name.startswith(prefix)]
    ranks = sorted({int(match[1]) for match in map(_RANK.match, names) if match})
    if not ranks or ranks != list(range(len(ranks))):
        raise InputError(
            f"rank {optimizer.backend.rank}: under {prefix!r} the checkpoint holds the state of ranks {ranks}; "
            "expected those of all, as onebit.optim.sharded.tensors_of makes them: give the key that they were saved "
            "under, with a dot"
        )
    own = f"rank{optimizer.backend.rank}."
    alike = len(ranks) == optimizer.backend.size and _is_part_here(optimizer, names)
    wanted = [n for n in names if n.startswith(f"{_COMMON}.") or not alike or n.startswith(own)]
    kinds = {name: sizes[prefix + name] for name in wanted}
    return {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in kinds.items()}


def load(optimizer: CompressedOptimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what was read into `room_for`'s tensors; collective, and all ranks do it or none.

    On as many ranks they go on bit for bit; on another number see `onebit.optim.elastic.reshard`. Load the model
    before: between synchronisations of 0/1 Adam it has one rank's parameters, and each rank's own are put back here.

    Args:
        optimizer: made with the same parameter groups; changed in place.
        tensors: by name; not changed, but the optimizer may keep some of them.

    Raises:
        InputError: tensors are missing or do not fit; nothing was changed, on any rank.
        MismatchError: the same on the other ranks, or what they have read differs.
        TransportError: a rank did not take part within the timeout; nothing was changed.
    """
    rank, size = optimizer.backend.rank, optimizer.backend.size
    place = optimizer._place()
    own: dict[str, Tensor] = {}

    def read() -> dict[str, Any]:
        ranks = sorted({int(match[1]) for match in map(_RANK.match, tensors) if match})
        parts = {old: _state_of(old, tensors) for old in ranks}
        sizes = {world_size for world_size, _ in parts.values()}
        everything = list(range(max(sizes, default=0)))
        if len(sizes) != 1 or ranks not in ([rank] if sizes == {size} else everything, everything):
            raise InputError(
                f"rank {rank} of {size}: what was read is of ranks {ranks}, of {sorted(sizes)} that were saved; read "
                "everything that room_for lists"
            )
        for _, state in parts.values():
            optimizer._check_saved(state)
        if sizes != {size} or not optimizer._takes(parts[rank][1]):
            return reshard([state for _, state in parts.values()], rank, size, node=place)
        own.update(_own_parameters(rank, tensors, params))
        return parts[rank][1]

    params = [p for group in optimizer.param_groups for p in group["params"]]
    resume(optimizer, read)
    with torch.no_grad():
        for name, value in own.items():
            params[int(name)].copy_(value)


def _own_parameters(rank: int, tensors: Mapping[str, Tensor], params: Sequence[Tensor]) -> dict[str, Tensor]:
    """By place, the values of parameters that only this rank had."""
    start = f"rank{rank}.{_PARAMETER}."
    own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    for place, value in own.items():
        if not place.isdigit() or int(place) >= len(params) or value.shape != params[int(place)].shape:
            raise InputError(f"rank {rank}: what was read of parameter {place} is of shape {tuple(value.shape)}")
    return own


def _part_saved(optimizer: CompressedOptimizer, state: Mapping[str, Any]) -> str:
    """Whose error feedback a state has, and which slices: what decides which ranks can go on from it alone."""
    extra = state[EXTRA]
    places = [f"{one['rank']}-{one['world_size']}" for one in extra[RESIDUALS] if len(one) > 1]
    slices = extra.get(SLICES)
    held = _WHOLE if slices is None else f"{slices['rank']}-{slices['ranks']}-{_dealing(optimizer)}"
    return f"{places[0] if places else _NO_FEEDBACK}.{held}"


def _is_part_here(optimizer: CompressedOptimizer, names: Sequence[str]) -> bool:
    """Whether what this rank would save now is what it has saved, from the names that there are; as `_place`."""
    rank, levels = optimizer.backend.rank, optimizer._nodes()
    place, places = optimizer._place()
    start = f"rank{rank}.{_OF}"
    one_level = f"{rank}-{optimizer.backend.size}.{_WHOLE}"
    saved = next((name.removeprefix(start) for name in names if name.startswith(start)), one_level)
    feedback, held = saved.split(".", 1)
    own = "" if levels is None else f"{levels.inside.rank}-{levels.inside.size}-{_dealing(optimizer)}"
    return feedback in (_NO_FEEDBACK, f"{place}-{places}") and held in (_WHOLE, own if optimizer._shard else _WHOLE)


def _dealing(optimizer: CompressedOptimizer) -> str:
    """What slices depend on beside the ranks and the parameters."""
    return f"{optimizer._codec.block_size}-{optimizer._bucket_size()}"


def _tensors_in(state: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], MutableMapping[str, Any], str]]:
    """Every tensor of more than one element: where its entry is, the entry, a copy in `state`, and its key there."""
    entries = state["state"]
    for index in entries:
        entries[index] = dict(entries[index])
        yield from ((("state", str(index)), entries[index], key) for key in _large(entries[index]))
    for g, feedback in enumerate(state[EXTRA][RESIDUALS]):
        yield from (((EXTRA, _FEEDBACK, str(g)), feedback, key) for key in _large(feedback))


def _large(entry: Mapping[str, Any]) -> list[str]:
    return [key for key, value in entry.items() if isinstance(value, Tensor) and value.numel() > 1]


def _apart(optimizer: CompressedOptimizer, state: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """The parameters, by their place, that are not the same on every rank."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return ((i, params[i]) for i, entry in state["state"].items() if RATE in entry and params[i].numel())


def _state_of(rank: int, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
    """The number of ranks that there were, and the ``state_dict()`` that this one had.

    Raises:
        InputError: its parts cannot be read or put together.
    """
    own = f"rank{rank}."
    other = tuple(own + name for name in (_REST, _PARAMETER, _OF))
    try:
        rest = torch.load(io.BytesIO(tensors[own + _REST].numpy().tobytes()), map_location="cpu", weights_only=True)
        world_size, state = int(rest["world_size"]), rest["state"]
        for name, tensor in tensors.items():
            if name.startswith(own + _FEEDBACK):
                g, key = name.removeprefix(f"{own}{_FEEDBACK}.").split(".")
                state[EXTRA][RESIDUALS][int(g)][key] = tensor
            elif name.startswith((f"{_COMMON}.", own)) and not name.startswith(other):
                index, key = name.split(".")[1:]
                state["state"][int(index)][key] = tensor
    except Exception as error:  # torch.load raises whatever damaged bytes lead to
        raise InputError(
            f"what was read of rank {rank} cannot be put together: {type(error).__name__}: {error}; read everything "
            "that room_for lists, from a checkpoint that holds what tensors_of gave"
        ) from error
    return world_size, state
