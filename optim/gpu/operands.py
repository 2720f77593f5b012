"""The lists of tensors that a fused step reads and writes, as kernels are told of them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.compress.gpu.pointers import Pointers
from onebit.compress.layout import Layout
from onebit.compress.masks import masked_blocks
from onebit.optim.gpu.blocks import Group, groups

TYPES = ("f32", "bf16", "f16")  # numbered as `Type` in momentum.cu
_DOUBLE, _WORD = struct.Struct("d"), struct.Struct("q")
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass
class Operand:
    """One list of tensors; what it says of them is what they were when they were last sent.

    Attributes:
        pointers: their addresses on the device.
        version: grows with every change of what stands below.
        types: (k,) int64, numbers of TYPES; a tensor that is not there has that of the first one that is.
        present: (k,) int64, 1 or 0.
        aligned: (k,) bool, addresses are multiples of 16.
    """

    pointers: Pointers
    version: int = 0
    types: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    present: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    aligned: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    _dtypes: list[torch.dtype | None] = field(default_factory=list)

    @property
    def address(self) -> int:
        """Of the table of addresses."""
        return self.pointers.address

    def send(self, tensors: Sequence[Tensor | None], fp32: bool) -> None:
        """Tell the device of these tensors, all of them fp32 or any, if they are not the ones it knows."""
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        moved = self.pointers.send(addresses) or not self.version
        dtypes = self._dtypes if fp32 and not moved else [None if t is None else t.dtype for t in tensors]
        if moved:
            aligned = np.array(addresses, np.int64) % 16 == 0
            if not np.array_equal(aligned, self.aligned):
                self.aligned = aligned
                self.version += 1
        if dtypes != self._dtypes:
            absent = next((_NUMBERS[d] for d in dtypes if d is not None), 0)
            self.types = np.array([absent if d is None else _NUMBERS[d] for d in dtypes], np.int64)
            self.present = np.array([d is not None for d in dtypes], np.int64)
            self._dtypes = dtypes
            self.version += 1


def operand(
    role: str, tensors: Sequence[Tensor | None], layout: Layout, device: torch.device, *, fp32: bool = False
) -> Operand:
    """The operand that plays `role` for the tensors of a layout, sent to the device; it is kept with the layout.

    Args:
        fp32: all tensors are, whatever they are; saves looking.
    """
    key = ("operand", role, device)
    if key not in layout.cache:
        layout.cache[key] = Operand(Pointers(len(tensors), device))
    kept: Operand = layout.cache[key]
    kept.send(tensors, fp32)
    return kept


def sorted_blocks(
    purpose: str,
    layout: Layout,
    device: torch.device,
    operands: Sequence[Operand],
    plain: bool,
    kinds: Callable[[], npt.NDArray[np.int64]],
    mask: Tensor | None = None,
) -> tuple[Group, ...]:
    """The groups of blocks for launches that serve `purpose`; sorted anew only when an operand or the mask has changed.

    Args:
        operands: those whose addresses the fast kernels need aligned.
        plain: nothing but a mask keeps the fast kernels from these blocks.
        kinds: gives each tensor's kind.
        mask: of the layout, as the codec takes it.
    """
    masked = masked_blocks(mask, layout)
    key, known = ("sorted", purpose, device), (plain, masked, *[o.version for o in operands])
    kept: tuple[tuple[object, ...], tuple[Group, ...]] | None = layout.cache.get(key)
    if kept is None or kept[0] != known:
        fast = np.logical_and.reduce([o.aligned for o in operands]) & plain
        kept = layout.cache[key] = (known, groups(layout, device, kinds(), fast, masked))
    return kept[1]


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies, as a launch takes it; 0 if there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def bits(number: float) -> int:
    """A number as the 64-bit integer that a launch takes."""
    word: int = _WORD.unpack(_DOUBLE.pack(number))[0]
    return word
