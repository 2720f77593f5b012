"""Makes a model or tensors equal to one rank's, as parameters must be before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from onebit.comm.agreement import agree
from onebit.comm.backend import Backend
from onebit.comm.broadcast_tensors import described, named_tensors, refusal_of
from onebit.comm.errors import BackendError
from onebit.comm.registry import depends_on_device, make_backend
from onebit.comm.tensors import Tensors
from onebit.compress.errors import InputError

TOGETHER = 1 << 26  # bytes of small tensors that travel in one collective

_REMEDY = (
    "Nothing was exchanged or changed. Every rank must make this call with the same options and the same tensors, in "
    "the same order, or the same model, built and cast alike"
)


def broadcast(tensors: Tensors | nn.Module, backend: object = None, source: int = 0) -> None:
    """Overwrite a model or `tensors` on every rank with those of rank `source`, bit for bit; collective.

    Over a group that has a half for CUDA tensors these bytes travel by it as soon as one tensor is on such a device.
    What the backend does not carry where it lies, such as a CPU tensor over NCCL, travels in a copy that it does.

    Args:
        tensors: a module, whose parameters and buffers are meant, those that its ``state_dict()`` leaves out included;
            or a tensor or list of tensors. Of any dtype, shape and strides, on CPUs, on CUDA devices or on both;
            overwritten in place on all ranks but `source`.
        backend: as for `make_backend`.
        source: the rank whose values are kept.

    Raises:
        InputError: no such rank, or a tensor that cannot travel or be overwritten: a sparse, nested or quantized one, a
            DTensor, one without values (on device meta, or of a lazy module), or one whose elements share memory, such
            as an expanded one. Other ranks get a MismatchError that quotes it; nothing was changed.
        MismatchError: ranks differ in names, shapes, dtypes, shared memory or source; nothing was changed.
        BackendError: no such backend.
        TransportError: a rank is dead or too slow; tensors may have been overwritten in part.
    """
    refusal = None
    try:
        named = named_tensors(tensors)
    except InputError as error:
        named, refusal = {}, error
    meeting, carrier = _groups(backend, named.values())
    refusal = _told(meeting, refusal or refusal_of(named) or _refused_source(meeting, source))
    facts = {} if isinstance(tensors, nn.Module) else {"the number of tensors": str(len(named))}
    if refusal is None:
        facts.update(described(named))
    facts.update({"source": str(source), "backend": carrier.name})
    agree(meeting, "broadcast", facts, refusal, remedy=_REMEDY)
    if carrier.size == 1:
        return
    with carrier.limited("broadcast"):
        for batch in _batches(named.values()):
            _spread(carrier, batch, source)
    carrier.check()


def _groups(spec: object, tensors: Iterable[Tensor]) -> tuple[Backend, Backend]:
    """Where ranks compare, the same half of a group whatever tensors they bring, and where the bytes travel."""
    meeting = make_backend(spec)
    if depends_on_device(spec) and meeting.device_type == "cpu" and any(t.is_cuda for t in tensors):
        with suppress(BackendError):  # this group has no such half
            return meeting, make_backend(spec, device="cuda")
    return meeting, meeting


def _refused_source(group: Backend, source: object) -> InputError | None:
    if isinstance(source, int) and 0 <= source < group.size:
        return None
    return InputError(f"source must be in [0, {group.size}), got {source!r}")


def _told(group: Backend, refusal: InputError | None) -> InputError | None:
    """The same, saying whose it is."""
    return None if refusal is None else InputError(f"rank {group.rank}: broadcast: {refusal}")


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that travel together, the same on all ranks: one that is large, or several that are not."""
    batch: list[Tensor] = []
    total = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if batch and total + nbytes > TOGETHER:
            yield batch
            batch, total = [], 0
        if nbytes:
            batch.append(tensor)
            total += nbytes
    if batch:
        yield batch


def _spread(group: Backend, batch: Sequence[Tensor], source: int) -> None:
    rows = [_bytes_of(tensor) for tensor in batch]
    device = next((t.device for t in batch if t.device.type == group.device_type), group.device_type or "cpu")
    # A sum in which all but one rank give zero bytes moves any bit pattern unchanged.
    if group.rank == source:
        carried = torch.cat([row.to(device) for row in rows])
    else:
        carried = torch.zeros(sum(map(len, rows)), dtype=torch.uint8, device=device)
    group.all_reduce(carried).wait()
    if group.rank == source:
        return
    for tensor, row, came in zip(batch, rows, torch.split(carried, [len(row) for row in rows]), strict=True):
        row.copy_(came)
        if not _lies_in_rows(tensor):
            tensor.copy_(row.view(tensor.dtype).view(tensor.shape))


def _bytes_of(tensor: Tensor) -> Tensor:
    """(n,) uint8: the memory of the tensor itself if its elements lie in row-major order, else a copy."""
    rows = tensor if _lies_in_rows(tensor) else tensor.resolve_conj().resolve_neg().contiguous()
    return rows.as_strided((rows.numel(),), (1,)).view(torch.uint8)  # one element may have any stride


def _lies_in_rows(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
