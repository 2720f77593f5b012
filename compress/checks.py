"""Checks of what the operators of a codec are called with: dtypes, devices, sizes and alignment of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.compress.errors import InputError
from onebit.compress.kernels import DTYPES
from onebit.compress.layout import ALIGNMENT, Layout


def dense_tensors(x: Tensor | Sequence[Tensor], operation: str) -> Sequence[Tensor]:
    """Check a tensor or a list of them: one supported dtype, contiguous."""
    tensors = [x] if isinstance(x, Tensor) else list(x)
    for t in tensors:
        if t.dtype not in DTYPES or t.layout != torch.strided:
            raise InputError(
                f"{operation}: takes dense float32, bfloat16 or float16, got {_name(t)} of shape {tuple(t.shape)}"
                f"{'' if t.layout == torch.strided else f' with layout {t.layout}'}; convert it first"
            )
        if t.dtype != tensors[0].dtype:
            raise InputError(f"{operation}: tensors of one call share a dtype, got {_name(tensors[0])} and {_name(t)}")
        if not t.is_contiguous():
            raise InputError(
                f"{operation}: takes contiguous tensors, got shape {tuple(t.shape)} with strides {t.stride()}; call "
                ".contiguous() first"
            )
    return tensors


def one_device(tensors: Sequence[Tensor], operation: str) -> torch.device:
    """Return the device that all tensors are on, or raise."""
    for t in tensors:
        if t.device != tensors[0].device:
            raise InputError(f"{operation}: tensors are on {tensors[0].device} and {t.device}; move them to one device")
    return tensors[0].device if tensors else torch.device("cpu")


def check_bytes(tensor: Tensor, operation: str) -> None:
    """Raise unless the tensor is uint8 and contiguous."""
    if tensor.dtype != torch.uint8 or not _is_contiguous(tensor):
        raise InputError(f"{operation}: payload bytes are a contiguous uint8 tensor, got {_name(tensor)}")


def payload_rows(payloads: Tensor, payload_bytes: int, operation: str) -> Tensor:
    """Return payloads as (k, payload_bytes), or raise."""
    check_bytes(payloads, operation)
    if payload_bytes == 0 and payloads.numel() == 0:
        return payloads
    if payload_bytes == 0 or payloads.numel() == 0 or payloads.numel() % payload_bytes:
        raise InputError(
            f"{operation}: expected payloads of {payload_bytes} bytes each, got {payloads.numel()} bytes in all"
        )
    _check_aligned(payloads, operation)
    return payloads.view(-1, payload_bytes)


def _check_aligned(payloads: Tensor, operation: str) -> None:
    past = payloads.data_ptr() % ALIGNMENT
    if past:
        raise InputError(
            f"{operation}: payloads start on a multiple of {ALIGNMENT} bytes, got an address {past} bytes past one; "
            "clone() the tensor, or slice it at a multiple"
        )


def checked_numel(numel: object, operation: str) -> int:
    """Return a number of elements, or raise."""
    if type(numel) is not int or numel < 0:
        raise InputError(f"{operation}: numel must be an int and not be negative, got {numel!r}")
    return numel


def check_residual(
    residual: Tensor | None, padded: int, layout: Layout, device: torch.device, chunk: int | None = None
) -> None:
    """Raise unless a residual can be that of a layout, or of one chunk of it, with up to `padded` elements."""
    if residual is None:
        return
    segments = layout.segments if chunk is None else layout.chunk_segments(chunk)
    least = max((layout.residual_span(s).stop for s in segments), default=0)
    contiguous = _is_contiguous(residual)
    if residual.dtype != torch.float32 or not contiguous or residual.device != device:
        raise InputError(
            f"the residual must be contiguous float32 on {device}, got {_name(residual)} on {residual.device}, "
            f"{'contiguous' if contiguous else 'strided or sparse'}"
        )
    if not least <= residual.numel() <= max(padded, least):
        raise InputError(f"the residual must have from {least} to {padded} elements, got {residual.numel()}")


def full_mask(mask: Tensor | None, layout: Layout, device: torch.device) -> Tensor | None:
    """Check a mask; fill it up with zeros if it ends with the last real element."""
    if mask is None:
        return None
    check_bytes(mask, "mask")
    full = layout.padded_numel // 8
    least = -(-max((layout.residual_span(s).stop for s in layout.segments), default=0) // 8)
    if mask.device != device or not least <= mask.numel() <= full:
        raise InputError(
            f"the mask must have from {least} to {full} bytes on {device}, got {mask.numel()} on {mask.device}"
        )
    return torch.nn.functional.pad(mask, (0, full - mask.numel())) if mask.numel() < full else mask


def byte_output(out: Tensor | None, n_bytes: int, device: torch.device) -> Tensor:
    """Return `out`, checked, or new bytes, all 0."""
    if out is None:
        return torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    check_bytes(out, "out")
    if out.numel() != n_bytes or out.device != device:
        raise InputError(f"out must have {n_bytes} bytes on {device}, got {out.numel()} on {out.device}")
    return out


def payload_output(out: Tensor | None, payloads: int, layout: Layout, device: torch.device) -> Tensor:
    """Check or make room for payloads; the bytes that fill their sections up to 16 are 0, whatever `out` held."""
    if out is None:
        return byte_output(None, payloads * layout.payload_bytes, device)
    byte_output(out, payloads * layout.payload_bytes, device)
    _check_aligned(out, "out")
    rows = out.view(payloads, -1) if layout.blocks else out
    for spare in layout.spare_bytes:
        rows[:, spare].zero_()
    return out


def _is_contiguous(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_contiguous()  # which not every sparse tensor can be asked


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
