"""Makes tensors equal to one rank's, as parameters must be before training starts."""

from __future__ import annotations

import torch

from onebit.comm.tensors import Tensors, agree_on_tensors, as_list, resolve
from onebit.compress.errors import InputError


def broadcast(tensors: Tensors, backend: object = None, source: int = 0) -> None:
    """Overwrite `tensors` on every rank with those of rank `source`, bit for bit; collective.

    Args:
        tensors: a tensor or list of tensors, fp32, bf16 or fp16, such as ``list(model.parameters())``.
        backend: as for `CompressedAllreduce`.
        source: the rank whose values are kept.

    Raises:
        InputError: no such rank, or tensors that cannot travel; nothing was changed.
        MismatchError: ranks differ in shapes, dtypes or source.
    """
    listed = as_list(tensors)
    group = resolve(listed, backend)
    if not isinstance(source, int) or not 0 <= source < group.size:
        raise InputError(f"rank {group.rank}: broadcast: source must be in [0, {group.size}), got {source!r}")
    agree_on_tensors(group, "broadcast", listed, {"source": source})
    if group.size == 1:
        return
    for tensor in listed:
        # A sum in which all but one rank give zero bytes moves any bit pattern unchanged.
        carried = tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        if group.rank != source:
            carried.zero_()
        group.all_reduce(carried).wait()
        tensor.copy_(carried.view(tensor.dtype).view(tensor.shape))
