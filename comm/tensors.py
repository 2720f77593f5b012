"""The list of tensors that an average was made for: checked once against the ranks, then against every call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebit.comm.agreement import agree
from onebit.comm.backend import Backend
from onebit.comm.registry import make_backend
from onebit.compress.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Tensors = Tensor | Sequence[Tensor]


def as_list(tensors: Tensors) -> list[Tensor]:
    """A list of plain tensors that share memory with the given ones.

    Raises:
        InputError: something in it is not a tensor.
    """
    if not isinstance(tensors, (Tensor, Iterable)):
        raise InputError(f"expected a tensor or a list of tensors, got {type(tensors).__name__}")
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for index, t in enumerate(listed):
        if not isinstance(t, Tensor):
            remedy = "; for a gradient that this rank does not have pass zeros" if t is None else ""
            raise InputError(
                f"expected a tensor or a list of tensors, got {type(t).__name__} at position {index}{remedy}"
            )
    return [t.detach() if t.requires_grad else t for t in listed]


def resolve(tensors: Sequence[Tensor], backend: object) -> Backend:
    """The backend to use for these tensors; see `make_backend`."""
    if isinstance(backend, (str, Backend)):
        named = make_backend(backend)
        if named.device_type != "cuda":
            return named  # it can tell all ranks if one brings tensors that it does not carry; agree_on_tensors does
    device = tensors[0].device if tensors else torch.device("cpu")
    return make_backend(backend, device=device)


def agree_on_tensors(
    backend: Backend,
    subject: str,
    tensors: Sequence[Tensor],
    options: Mapping[str, object],
    refusal: InputError | None = None,
    *,
    written: bool = False,
) -> None:
    """Check dtypes and devices here, then that all ranks hold the same list and options; collective.

    Args:
        refusal: an error that this rank has found already, to be raised here once the others know.
        written: the tensors will be written, so every element must have a place of its own.

    Raises:
        InputError: this rank's tensors cannot be averaged; other ranks get a MismatchError that quotes it.
        MismatchError: ranks differ.
    """
    facts = {"the number of tensors": str(len(tensors))}
    facts.update({f"tensor {i}": describe(t) for i, t in enumerate(tensors)})
    facts.update({name: str(value) for name, value in options.items()})
    agree(backend, subject, facts, _refusal(backend, subject, tensors, written) or refusal)


@dataclass(frozen=True)
class Kind:
    """What a tensor has in common with another that can take its place."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> Kind:
        """The kind of `tensor`."""
        return Kind(tensor.dtype, tensor.shape, tensor.device)

    def fits(self, tensor: Tensor) -> bool:
        """Whether `tensor` is of this kind."""
        alike = tensor.dtype == self.dtype and tensor.shape == self.shape and tensor.device == self.device
        return alike and tensor.layout == torch.strided


def check_same(rank: int, tensors: Sequence[Tensor], like: Sequence[Kind]) -> None:
    """Raise unless the tensors of a call are of the kinds that the average was made for.

    Raises:
        InputError: another number, shape, dtype or device.
    """
    if len(tensors) != len(like):
        raise InputError(f"rank {rank}: made for {len(like)} tensors, called with {len(tensors)}")
    for index, (t, expected) in enumerate(zip(tensors, like, strict=True)):
        if not expected.fits(t):
            raise InputError(
                f"rank {rank}: tensor {index} was {describe(expected)} on {expected.device} when this average was "
                f"made, and is {describe(t)} on {t.device} now; make a new one when shapes change"
            )


def check_targets(rank: int, tensors: Sequence[Tensor], like: Sequence[Kind]) -> None:
    """As `check_same`, of tensors that are to be written.

    Raises:
        InputError: another number, shape, dtype or device, or elements that share memory.
    """
    check_same(rank, tensors, like)
    for index, t in enumerate(tensors):
        shared = shared_places(t)
        if shared is not None:
            raise InputError(f"rank {rank}: tensor {index} {shared}")


def shared_places(tensor: Tensor) -> str | None:
    """Why a strided tensor cannot be written, as some of its elements may lie in one place; None: it can."""
    if tensor.is_contiguous() or not _overlaps(tensor):
        return None
    return (
        f"must have its elements in places of their own, got {describe(tensor)} with strides {tensor.stride()}, as "
        "expand() makes them; give the tensor that it was made of, or a clone()"
    )


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """0-dim bool on the tensors' device: no element is infinite or NaN."""
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return torch.ones((), dtype=torch.bool)
    largest = torch._foreach_norm(filled, float("inf"))  # NaN and infinity reach the largest absolute value
    return torch.stack([norm.float() for norm in largest]).isfinite().all()


def describe(tensor: Tensor | Kind) -> str:
    """Dtype and shape, as messages and fingerprints say them."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may lie in one place: a dimension's step is no longer than all shorter ones together reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if tensor.numel() and size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _refusal(backend: Backend, subject: str, tensors: Sequence[Tensor], written: bool) -> InputError | None:
    for index, t in enumerate(tensors):
        where = f"rank {backend.rank}: {subject}: tensor {index}"
        if t.dtype not in DTYPES or t.layout != torch.strided:
            kind = "" if t.layout == torch.strided else f" with layout {t.layout}"
            return InputError(
                f"{where} must be dense float32, bfloat16 or float16, got {describe(t)}{kind}; convert it first"
            )
        if not backend.carries(t.device):
            return InputError(
                f"{where} is on {t.device}, but the {backend.name!r} backend carries {backend.carried} tensors; "
                "move it, or use 'gloo' or 'mpi' for cpu tensors and 'nccl' or 'mpi' for cuda tensors"
            )
        if t.device != tensors[0].device:
            return InputError(f"{where} is on {t.device}, tensor 0 on {tensors[0].device}; average them separately")
        shared = shared_places(t) if written else None
        if shared is not None:
            return InputError(f"{where} {shared}")
    return None
