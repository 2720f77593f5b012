"""`SignCodec`: one bit per number, one scale per block, and a residual that remembers what was not said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from onebit.compress.errors import InputError
from onebit.compress.kernels import DTYPES, Kernels, kernels_for
from onebit.compress.layout import ALIGNMENT, Layout, plan


@dataclass(frozen=True, kw_only=True)
class SignCodec:
    """Encodes c = x + residual as signs and one scale s per block; the new residual is c - s·sign(c).

    Zero and -0.0 count as positive, NaN as negative. A block with a non-finite c sends the scale NaN, decodes to NaN
    and leaves its residual as it was. All arithmetic is fp32. Error feedback: Seide et al. 2014; the scale that makes
    the sign
    a contraction: Karimireddy et al. 2019 (arXiv 1901.09847).

    Attributes:
        block_size: consecutive elements of one tensor that share a scale, a multiple of 32; None: all elements of a
            tensor share one, as in the published 1-bit Adam.
        scale: ``"mean"`` of |c|, the least-squares choice, or ``"rms"``, the root mean square of the published
            implementation, which does not contract on sparse data.
        kernels: name of the implementation to use; None: the fastest for the device of the tensors.

    Raises:
        InputError: an attribute has a value other than these.
    """

    block_size: int | None = 1024
    scale: Literal["mean", "rms"] = "mean"
    kernels: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        size = self.block_size
        if size is not None and (type(size) is not int or size < 32 or size % 32):
            raise InputError(
                f"SignCodec: block_size must be a positive multiple of 32, or None for a scale per tensor, got {size!r}"
            )
        if self.scale not in ("mean", "rms"):
            raise InputError(f"SignCodec: scale must be 'mean' or 'rms', got {self.scale!r}")

    def kernels_on(self, device: torch.device | str) -> str:
        """Return the name of the implementation that runs for tensors on `device`."""
        return kernels_for(torch.device(device), self.kernels).name

    def unchecked(self, device: torch.device) -> SignOperators:
        """Return the operators without checks, for who makes the same call again and again.

        The checked methods below say what the arguments must be; here `mask` has layout.padded_numel / 8 bytes, and
        payloads are (ranks, payload_bytes).
        """
        return SignOperators(kernels_for(device, self.kernels), self.scale == "rms")

    def plan(
        self, tensors: Sequence[Tensor | int], chunks: int = 1, bucket_numel: int | None = None
    ) -> tuple[Layout, ...]:
        """Lay out tensors (or their sizes) for `chunks` ranks, in buckets of about `bucket_numel` elements.

        Returns:
            One layout per bucket; at least one.
        """
        numels = [t if isinstance(t, int) else t.numel() for t in tensors]
        return plan(numels, self.block_size, chunks, bucket_numel)

    def encode(
        self,
        x: Tensor | Sequence[Tensor],
        residual: Tensor | None = None,
        *,
        layout: Layout | None = None,
        mask: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Encode `x` + `residual`; what the payload does not say goes into `residual`.

        Args:
            x: a contiguous tensor of any shape, fp32, bf16 or fp16, or the list of them that `layout` was planned for.
            residual: fp32, updated in place. For one tensor at least x.numel() elements, with a layout of several
                tensors `layout.padded_numel`. None: nothing is added and the error is dropped.
            layout: from `plan`; None: one payload of `x` alone.
            mask: uint8, one bit per element in the layout's block order (for one tensor: element order),
                little-endian. A set bit takes the element out: it counts in no scale, holds no residual and decodes
                to 0.
            out: (chunks · payload_bytes,) uint8 to write to; None: a new one. Must not overlap the other arguments.

        Returns:
            `out`: one payload per chunk, each ``[bits | fp32 scales]``.

        Raises:
            InputError: a wrong dtype, size, device or layout; nothing was changed.
        """
        tensors = _tensors(x, "encode")
        layout = self._layout(layout, tensors, "encode")
        device = _one_device(tensors, "encode")
        _check_residual(residual, layout.padded_numel, layout, device)
        mask = _full_mask(mask, layout, device)
        out = _payload_output(out, layout.chunks, layout, device)
        self.unchecked(device).encode(tensors, residual, mask, out, layout)
        return out

    def reduce_encode(
        self,
        payloads: Tensor,
        residual: Tensor | None = None,
        *,
        numel: int | None = None,
        layout: Layout | None = None,
        chunk: int = 0,
        mask: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Encode the mean of several ranks' payloads of one chunk, plus `residual`.

        Args:
            payloads: (ranks, payload_bytes) or flat, uint8, contiguous.
            residual: fp32 of that chunk, updated in place: for one tensor at least `numel` elements, else
                `layout.chunk_numel`.
            numel: number of elements, in place of `layout`, for payloads of one tensor.
            layout, mask, out: as for `encode`; `out` is (payload_bytes,).
            chunk: which chunk of the layout the payloads are of.

        Returns:
            `out`.

        Raises:
            InputError: a wrong dtype, size, device or layout; nothing was changed.
        """
        layout = self._layout(layout, numel, "reduce_encode")
        if not 0 <= chunk < layout.chunks:
            raise InputError(f"reduce_encode: chunk must be in [0, {layout.chunks}), got {chunk}")
        device = payloads.device
        rows = _payload_rows(payloads, layout.payload_bytes, "reduce_encode")
        _check_residual(residual, layout.chunk_numel, layout, device, chunk)
        mask = _full_mask(mask, layout, device)
        out = _payload_output(out, 1, layout, device)
        self.unchecked(device).reduce_encode(rows, residual, mask, out, layout, chunk)
        return out

    def decode(
        self,
        payloads: Tensor,
        out: Tensor | Sequence[Tensor] | None = None,
        *,
        numel: int | None = None,
        layout: Layout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | Sequence[Tensor]:
        """Turn one payload per chunk back into numbers.

        Args:
            payloads: (chunks, payload_bytes) or flat, uint8, contiguous.
            out: the contiguous tensor, or list of them, to write; rounded to its dtype. None: a new (numel,) fp32
                tensor.
            numel: number of elements when `out` is None.
            layout, mask: as given to `encode`.

        Returns:
            `out`.

        Raises:
            InputError: a wrong dtype, size, device or layout; nothing was changed.
        """
        if out is None:
            if numel is None:
                raise InputError("decode: give out=, the tensor to write, or numel=, the elements of a new one")
            out = torch.empty(_checked_numel(numel, "decode"), device=payloads.device)
        tensors = _tensors(out, "decode")
        layout = self._layout(layout, tensors, "decode")
        device = _one_device([payloads, *tensors], "decode")
        rows = _payload_rows(payloads, layout.payload_bytes, "decode")
        if layout.blocks and rows.shape[0] != layout.chunks:
            raise InputError(f"decode: expected {layout.chunks} payloads, one per chunk, got {rows.shape[0]}")
        mask = _full_mask(mask, layout, device)
        self.unchecked(device).decode(rows, mask, tensors, layout)
        return out

    def all_finite(self, payloads: Tensor, layout: Layout) -> Tensor:
        """Tell whether payloads decode to finite numbers, from their scales alone.

        Args:
            payloads: any number of payloads of `layout`, (k, payload_bytes) or flat, uint8, contiguous.

        Returns:
            0-dim bool on the device of `payloads`, without a synchronisation.

        Raises:
            InputError: a wrong dtype or size.
        """
        rows = _payload_rows(payloads, layout.payload_bytes, "all_finite")
        return self.unchecked(payloads.device).all_finite([rows], [layout])

    def _layout(self, layout: Layout | None, content: Sequence[Tensor] | int | None, operation: str) -> Layout:
        """The layout given, checked against the tensors; or the one of a single tensor."""
        if layout is None:
            if content is None:
                raise InputError(f"{operation}: give numel= (payloads of one tensor) or layout= (of several)")
            sizes = [t.numel() for t in content] if isinstance(content, list) else [_checked_numel(content, operation)]
            return self.plan(sizes)[0]
        if layout.shared_scale != (self.block_size is None) or self.block_size not in (None, layout.block_size):
            raise InputError(f"{operation}: the layout was planned with another block_size than {self.block_size}")
        if not isinstance(content, int) and content is not None:
            for s in layout.segments:
                if s.tensor >= len(content) or content[s.tensor].numel() < s.offset + s.numel:
                    raise InputError(
                        f"{operation}: the layout expects at least {s.offset + s.numel} elements in tensor {s.tensor}, "
                        f"got {content[s.tensor].numel() if s.tensor < len(content) else 'no such tensor'}; plan again "
                        "when shapes change"
                    )
        return layout


def as_codec(codec: SignCodec | None) -> SignCodec:
    """Return `codec`, or the default one for None.

    Raises:
        InputError: it is something else.
    """
    if codec is None:
        return SignCodec()
    if not isinstance(codec, SignCodec):
        raise InputError(f"a codec must be a SignCodec, such as SignCodec(block_size=1024), or None, got {codec!r}")
    return codec


@dataclass(frozen=True)
class SignOperators:
    """One implementation of the operators with the options of one `SignCodec`; nothing is checked."""

    kernels: Kernels
    squared: bool

    def encode(
        self, tensors: Sequence[Tensor], residual: Tensor | None, mask: Tensor | None, out: Tensor, layout: Layout
    ) -> None:
        """As `SignCodec.encode`."""
        if layout.blocks:
            self.kernels.encode(tensors, residual, mask, out, layout, self.squared)

    def reduce_encode(
        self,
        payloads: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        chunk: int,
    ) -> None:
        """As `SignCodec.reduce_encode`."""
        if layout.blocks:
            self.kernels.reduce_encode(payloads, residual, mask, out, layout, chunk, self.squared)

    def undo_reduce(
        self,
        payloads: Tensor,
        residual: Tensor,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        chunk: int,
        keep: Tensor | None = None,
    ) -> None:
        """Put `residual` back to what it was before `reduce_encode` of the same arguments, to within rounding.

        Args:
            keep: 0-dim bool on the same device: nothing is put back where it is true, and the host need not know; None:
                it is put back.
        """
        if layout.blocks:
            self.kernels.undo_reduce(payloads, residual, mask, out, layout, chunk, keep)

    def all_finite(self, payloads: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
        """As `SignCodec.all_finite`, of several buffers on one device, at least one, each with its layout."""
        if not any(layout.blocks for layout in layouts):
            return torch.ones((), dtype=torch.bool, device=payloads[0].device)
        return self.kernels.all_finite(payloads, layouts)

    def decode(self, payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout) -> None:
        """As `SignCodec.decode`."""
        if layout.blocks:
            self.kernels.decode(payloads, mask, tensors, layout)


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
    tensors = _tensors(x, "pack_signs")
    out = _output(out, -(-x.numel() // 8), x.device)
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
    _check_bytes(bits, "unpack_signs")
    if out is None:
        numel = bits.numel() * 8 if numel is None else _checked_numel(numel, "unpack_signs")
        out = torch.empty(numel, device=bits.device)
    _tensors(out, "unpack_signs")
    _one_device([bits, out], "unpack_signs")
    if bits.numel() != -(-out.numel() // 8):
        raise InputError(f"unpack_signs: {out.numel()} elements need {-(-out.numel() // 8)} bytes, got {bits.numel()}")
    if out.numel():
        kernels_for(bits.device, kernels).unpack_signs(bits, out)
    return out


def _tensors(x: Tensor | Sequence[Tensor], operation: str) -> Sequence[Tensor]:
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


def _one_device(tensors: Sequence[Tensor], operation: str) -> torch.device:
    for t in tensors:
        if t.device != tensors[0].device:
            raise InputError(f"{operation}: tensors are on {tensors[0].device} and {t.device}; move them to one device")
    return tensors[0].device if tensors else torch.device("cpu")


def _check_bytes(tensor: Tensor, operation: str) -> None:
    if tensor.dtype != torch.uint8 or not _is_contiguous(tensor):
        raise InputError(f"{operation}: payload bytes are a contiguous uint8 tensor, got {_name(tensor)}")


def _payload_rows(payloads: Tensor, payload_bytes: int, operation: str) -> Tensor:
    _check_bytes(payloads, operation)
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


def _checked_numel(numel: object, operation: str) -> int:
    if type(numel) is not int or numel < 0:
        raise InputError(f"{operation}: numel must be an int and not be negative, got {numel!r}")
    return numel


def _check_residual(
    residual: Tensor | None, padded: int, layout: Layout, device: torch.device, chunk: int | None = None
) -> None:
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


def _full_mask(mask: Tensor | None, layout: Layout, device: torch.device) -> Tensor | None:
    """Check a mask; fill it up with zeros if it ends with the last real element."""
    if mask is None:
        return None
    _check_bytes(mask, "mask")
    full = layout.padded_numel // 8
    least = -(-max((layout.residual_span(s).stop for s in layout.segments), default=0) // 8)
    if mask.device != device or not least <= mask.numel() <= full:
        raise InputError(
            f"the mask must have from {least} to {full} bytes on {device}, got {mask.numel()} on {mask.device}"
        )
    return torch.nn.functional.pad(mask, (0, full - mask.numel())) if mask.numel() < full else mask


def _output(out: Tensor | None, n_bytes: int, device: torch.device) -> Tensor:
    if out is None:
        return torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    _check_bytes(out, "out")
    if out.numel() != n_bytes or out.device != device:
        raise InputError(f"out must have {n_bytes} bytes on {device}, got {out.numel()} on {out.device}")
    return out


def _payload_output(out: Tensor | None, payloads: int, layout: Layout, device: torch.device) -> Tensor:
    """Check or make room for payloads; the bytes that fill their sections up to 16 are 0, whatever `out` held."""
    if out is None:
        return _output(None, payloads * layout.payload_bytes, device)
    _output(out, payloads * layout.payload_bytes, device)
    _check_aligned(out, "out")
    rows = out.view(payloads, -1) if layout.blocks else out
    for spare in layout.spare_bytes:
        rows[:, spare].zero_()
    return out


def _is_contiguous(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_contiguous()  # which not every sparse tensor can be asked


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
