"""Which kernels update the parameters of a part: by their dtype, by fp32 masters, and by what each block is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onebit.comm.part import Part
from onebit.optim.gpu.blocks import Places
from onebit.optim.gpu.operands import TYPES, Operand, sorted_blocks


def updates(
    purpose: str,
    part: Part,
    device: torch.device,
    param: Operand,
    master: Operand,
    others: Sequence[Operand],
    plain: bool = True,
) -> Iterator[tuple[str, Places, int]]:
    """Per launch, the kernel's name, the blocks that it takes and the number of their parameters' dtype in TYPES.

    Args:
        purpose, plain: as for `sorted_blocks`.
        param, master: the parameters, and their fp32 copies where there are any.
        others: what the kernels read or write besides.
    """
    operands = (param, master, *others)
    groups = sorted_blocks(
        purpose, part.layout, device, operands, plain, lambda: param.types + 4 * master.present, part.mask
    )
    for group in groups:
        types = f"{'master_' if group.kind // 4 else ''}{TYPES[group.kind % 4]}"
        kernels = ((group.full, f"update_full_{types}"), (group.masked, f"update_masked_{types}"))
        for places, kernel in (*kernels, (group.rest, "update_any")):
            if places.n:
                yield kernel, places, group.kind % 4
