"""Checksums of parameters, and a collective that proves by them that all ranks hold the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onebit.comm import agree

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer

_AT_ONCE = 1 << 20  # elements that are widened to 64 bits together
_MIX = (-7046029254386353131, -4658895280553007687)  # odd, and as random as two constants can be
_REMEDY = (
    "The replicas have drifted apart: a rank has changed its parameters, or an option such as lr, by itself, or a "
    "device has computed wrongly. Go on from a checkpoint that passes this check, or make them equal with "
    "onebit.comm.broadcast"
)


def check_replicas(optimizer: CompressedOptimizer) -> None:
    """Return if all ranks hold the same parameters, bit for bit; collective, one of 32 bytes per rank if they do.

    It reads every parameter once, and fp32 masters too where every rank has them whole, and waits for the device. Of
    `ZeroOneAdam`, whose ranks differ between synchronisations, it compares what the parameters were when the ranks last
    met. ``check_every=k`` makes an optimizer call it after every k-th step.

    Raises:
        MismatchError: on every rank; it names the first parameter that is not the same and the ranks that differ.
        TransportError: a rank is dead or too slow.
    """
    backend = optimizer.backend
    if backend.size > 1:
        values = dict(_replicated(optimizer))
        facts = dict(zip(values, checksums(list(values.values())), strict=True))
        agree(backend, f"{type(optimizer).__name__}: check of replicas", facts, remedy=_REMEDY)


def checksums(tensors: Sequence[Tensor]) -> list[str]:
    """What tells different contents apart, per tensor: equal for equal bits in row-major order, whatever the strides.

    Words of 32 or 16 bits are added up with weights that no two places have in common, modulo 2⁶⁴, so neither swapped
    elements nor errors of opposite sign cancel. Waits for each device once.
    """
    sums = [_checksum(t) for t in tensors]
    numbers: dict[int, int] = {}
    for device in {s.device for s in sums}:
        here = [i for i, s in enumerate(sums) if s.device == device]
        numbers.update(zip(here, torch.stack([sums[i] for i in here]).tolist(), strict=True))
    return [f"checksum {numbers[i] % 2**64:016x}" for i in range(len(sums))]


def _replicated(optimizer: CompressedOptimizer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that must be the same on all ranks, with what to call it."""
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            name = f"parameter {i} of group {g}"
            if "param_names" in group:
                name += f" ({group['param_names'][i]})"
            common = optimizer._common_value(p)
            yield name, common
            master = optimizer.state.get(p, {}).get("master")
            if master is not None and master is not common and not optimizer._shard:
                yield f"the fp32 master of {name}", master


def _checksum(tensor: Tensor) -> Tensor:
    """0-dim int64 on the tensor's device."""
    words = tensor.detach().reshape(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    places = torch.arange(1, min(words.numel(), _AT_ONCE) + 1, device=words.device) * _MIX[0]
    weights = (places ^ (places >> 29)) * _MIX[1] | 1
    for start in range(0, words.numel(), _AT_ONCE):
        chunk = words[start : start + _AT_ONCE]
        total = total * _MIX[0] + (chunk.long() * weights[: chunk.numel()]).sum()
    return total
