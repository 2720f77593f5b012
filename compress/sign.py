"""`SignCodec`: one bit per number, one scale per block, and a residual that remembers what was not said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from onebit.compress.checks import byte_output, check_bytes, checked_numel, dense_tensors, one_device
from onebit.compress.codec import Codec
from onebit.compress.errors import InputError
from onebit.compress.kernels import kernels_for
from onebit.compress.operators import BoundOperators


@dataclass(frozen=True, kw_only=True)
class SignCodec(Codec):
    """Encodes c = x + residual as signs and one scale s per block; the new residual is c - s·sign(c).

    Zero and -0.0 count as positive, NaN as negative. A block with a non-finite c sends the scale NaN, decodes to NaN
    and leaves its residual as it was. All arithmetic is fp32. Error feedback: Seide et al. 2014; the scale that makes
    the sign a contraction: Karimireddy et al. 2019 (arXiv 1901.09847).

    Attributes:
        block_size: consecutive elements of one tensor that share a scale, a multiple of 32; None: all elements of a
            tensor share one, as in the published 1-bit Adam.
        scale: ``"mean"`` of |c|, the least-squares choice, or ``"rms"``, the root mean square of the published
            implementation, which does not contract on sparse data.
        kernels: name of the implementation to use; None: the fastest for the device of the tensors.

    Raises:
        InputError: an attribute has a value other than these.
    """

    bits: ClassVar[int] = 1

    scale: Literal["mean", "rms"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("mean", "rms"):
            raise InputError(f"SignCodec: scale must be 'mean' or 'rms', got {self.scale!r}")

    def kernels_on(self, device: torch.device | str) -> str:
        """Return the name of the implementation that runs for tensors on `device`."""
        return kernels_for(torch.device(device), self.kernels).name

    def unchecked(self, device: torch.device) -> SignOperators:
        """Return the operators without checks, for who makes the same call again and again."""
        return SignOperators(kernels_for(device, self.kernels), self.scale == "rms")


class SignOperators(BoundOperators[bool]):
    """The operators of a `SignCodec`; how a scale is taken is all they are told."""

    @property
    def squared(self) -> bool:
        """Whether a scale is the root of the mean square, not the mean magnitude."""
        return self.how


def pack_signs(x: Tensor, out: Tensor | None = None, *, kernels: str | None = None) -> Tensor:
    """Pack the signs of `x`: bit i is x[i] >= 0, little-endian within a byte, spare bits 0.

    ``numpy.unpackbits(bits, bitorder="little")[i]`` is element i, 1 for +, 0 for -. Both zeros are +, NaN is -.

    Args:
        x: contiguous, any shape, fp32, bf16 or fp16.
        out: (ceil(n / 8),) uint8 to write to; None: a new one.
        kernels: name of an implementation; None: the fastest.

    Raises:
        InputError: a wrong dtype, size or device.
    """
    tensors = dense_tensors(x, "pack_signs")
    out = byte_output(out, -(-x.numel() // 8), x.device)
    if x.numel():
        kernels_for(x.device, kernels).pack_signs(tensors[0], out)
    return out


def unpack_signs(
    bits: Tensor, out: Tensor | None = None, *, numel: int | None = None, kernels: str | None = None
) -> Tensor:
    """Unpack signs to +1 and -1.

    Args:
        bits: (ceil(n / 8),) uint8, contiguous.
        out: contiguous tensor of n elements, fp32, bf16 or fp16, to write to; None: a new (numel,) fp32 tensor.
        numel: n, when `out` is None; None: every bit.
        kernels: name of an implementation; None: the fastest.

    Raises:
        InputError: a wrong dtype, size or device.
    """
    check_bytes(bits, "unpack_signs")
    if out is None:
        numel = bits.numel() * 8 if numel is None else checked_numel(numel, "unpack_signs")
        out = torch.empty(numel, device=bits.device)
    dense_tensors(out, "unpack_signs")
    one_device([bits, out], "unpack_signs")
    if bits.numel() != -(-out.numel() // 8):
        raise InputError(f"unpack_signs: {out.numel()} elements need {-(-out.numel() // 8)} bytes, got {bits.numel()}")
    if out.numel():
        kernels_for(bits.device, kernels).unpack_signs(bits, out)
    return out
