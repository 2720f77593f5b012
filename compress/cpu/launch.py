"""From tensors to a compiled loop: addresses, dtype codes, and a share of the items for each thread."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.compress.cpu.block import BF16, F16, F32
from onebit.compress.cpu.build import compile_kernel
from onebit.compress.layout import ceil_div
from onebit.compress.threads import share_out

CODES = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
LEAST_ELEMENTS = 1 << 16  # per thread; waking a thread costs as much as encoding about this many

_compiled = functools.cache(compile_kernel)


def launch(kernel: Callable[..., None], items: int, elements_per_item: int, *arguments: int) -> None:
    """Call `kernel(first, last, *arguments)` over ranges that cover [0, items), compiled, on this rank's threads."""
    least = ceil_div(LEAST_ELEMENTS, elements_per_item)
    share_out(_compiled(kernel), items, least, *arguments)


def addresses(tensors: Sequence[Tensor | None]) -> npt.NDArray[np.int64]:
    """Where each tensor's elements start; 0 for None. The array must outlive the call that its address is given to."""
    return np.array([address(t) for t in tensors], np.int64)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements start; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
