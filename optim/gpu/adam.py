"""The launches of Adam's step on CUDA tensors: one for the factors of all tensors, one for each mix of dtypes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebit.compress.gpu.module import THREADS, launch
from onebit.compress.gpu.pointers import Pointers
from onebit.optim.gpu.adam_step import Kind, Shapes, Step

SOURCE = Path(__file__).with_name("adam.cu")
VECTORS = 1  # of four elements per thread; the same in adam.cu

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_DECOUPLED, _BIAS_CORRECTION, _MAXIMIZE, _LR_IS_DOUBLE, _ZERO = 1, 2, 4, 8, 16
_OPTIONS, _WORDS = struct.Struct("=dqddddqq"), struct.Struct("=8q")  # `Options` in adam.cu
_BYTES_OF_FACTORS = 48  # `Factors` in adam.cu


class AdamLaunches:
    """Makes steps of a fixed list of k tensors on one CUDA device.

    Args:
        shapes: of the tensors.
        steps: (k,) fp32 on the device: how many steps each tensor has made, counted on by the kernels.
        source, vectors: another version of the kernels, to compare.
    """

    def __init__(self, shapes: Shapes, steps: Tensor, source: Path = SOURCE, vectors: int = VECTORS) -> None:
        self._steps, self._source, self._k = steps, source, len(shapes.numels)
        device = steps.device
        self._memory, self._gradients = Pointers(4 * self._k, device), Pointers(self._k, device)
        self._options = Pointers(8 * (1 + max(shapes.groups)), device)
        self._numels = torch.tensor(shapes.numels, dtype=torch.int64).to(device)
        self._groups = torch.tensor(shapes.groups, dtype=torch.int32).to(device)
        self._factors = torch.zeros(self._k * _BYTES_OF_FACTORS, dtype=torch.uint8, device=device)
        numels = np.array(shapes.numels, dtype=np.int64)
        self._blocks: list[tuple[str, Tensor]] = []
        for kind in dict.fromkeys(shapes.kinds):
            members = np.array([index for index, other in enumerate(shapes.kinds) if other == kind], dtype=np.int64)
            table = blocks(numels, members, 4 * vectors * THREADS)
            if len(table):
                self._blocks.append((_kernel(kind), torch.from_numpy(table).to(device)))

    def __call__(self, step: Step) -> None:
        """Start the kernels on the current stream; the host does not wait."""
        device = self._steps.device
        options = step.groups[: len(self._options.table) // 8]
        rates = [_on_device(group["lr"], device) for group in options]  # kept until the kernel that reads them started
        self._options.send([word for pair in zip(options, rates, strict=True) for word in option_words(*pair)])
        self._memory.send(step.memory)
        self._gradients.send(step.gradients)
        tables = (self._gradients.address, self._groups.data_ptr(), self._options.address, self._k)
        scaler = (_address(step.found_inf), _address(step.grad_scale))
        factors = self._factors.data_ptr()
        launch(self._source, "adam_factors", device, self._k, *tables, *scaler, self._steps.data_ptr(), factors)
        rows = (self._memory.address, self._gradients.address, self._numels.data_ptr(), factors, self._k)
        for kernel, table in self._blocks:
            launch(self._source, kernel, device, THREADS * len(table), table.data_ptr(), *rows)


def blocks(numels: np.ndarray, members: np.ndarray, chunk: int) -> np.ndarray:
    """(n, 2) int32, a row per thread block: one of the tensors `members`, and which of its chunks."""
    counts = -(-numels[members] // chunk)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([np.repeat(members, counts), number], axis=1).astype(np.int32)


def option_words(group: Mapping[str, Any], rate: Tensor | None) -> tuple[int, ...]:
    """A group's options as the 64-bit words of `Options`; rate: where the learning rate is read, None: in the group."""
    flags = (
        _DECOUPLED * group["adam_w_mode"]
        | _BIAS_CORRECTION * group["bias_correction"]
        | _MAXIMIZE * group["maximize"]
        | _LR_IS_DOUBLE * (rate is not None and rate.dtype == torch.float64)
        | _ZERO * group["zero_gradients"]
    )
    lr, address = (float(group["lr"]), 0) if rate is None else (0.0, rate.data_ptr())
    numbers = (*group["betas"], group["eps"], group["weight_decay"])
    words: tuple[int, ...] = _WORDS.unpack(_OPTIONS.pack(lr, address, *numbers, flags, 0))
    return words


def _kernel(kind: Kind) -> str:
    return f"adam_{'master_' * kind.master}{_DTYPES[kind.param]}_{_DTYPES[kind.gradient]}"


def _on_device(lr: Any, device: torch.device) -> Tensor | None:
    """A learning rate that only a device knows, where the kernels can read it."""
    if not isinstance(lr, Tensor) or (lr.is_cpu and device.type != "cpu"):
        return None
    dtype = lr.dtype if lr.dtype in (torch.float32, torch.float64) else torch.float32
    return lr.detach().to(device, dtype, non_blocking=True)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
