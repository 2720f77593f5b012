"""Where the tensors of an Adam step lie in memory, as the compiled loops read it; made anew only when one has moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.comm.tensors import describe
from onebit.compress import InputError
from onebit.compress.cpu.launch import CODES, address
from onebit.compress.kernels import DTYPES
from onebit.optim.adam import dense_like, is_dense
from onebit.optim.cpu.adam import COLUMNS, NO_COPY

_ROW = np.dtype([(name, np.int64) for name in COLUMNS])
_dtype = attrgetter("dtype")


@dataclass(frozen=True)
class Operands:
    """The tensors of a step; entry i of each list belongs to parameter i, and all but its step have its shape.

    Attributes:
        copies: what takes the parameter's new value in bf16 or fp16, or None; an empty list: nobody wants any.
        steps: 0-dim fp32.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    copies: list[Tensor | None] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def kept(self) -> tuple[list[Tensor], ...]:
        """What usually is where it was at the step before."""
        return self.params, self.exp_avgs, self.exp_avg_sqs, self.steps


class Tables:
    """The tables of one step, and of those after it for as long as only gradients move.

    Attributes:
        rows: COLUMNS of each tensor, and one row more that says at which word the last tensor ends.
        steps: addresses of the counts.
        put_back: pairs of a tensor and of the copy that the step changes in its place, because it lies in memory in
            another order than its parameter, or with gaps.
    """

    def __init__(self, operands: Operands) -> None:
        """Make them for `operands`, whose lists get copies of what has to lie otherwise.

        Raises:
            InputError: a gradient or a state is not what the loops would take it for.
        """
        _check(operands)
        self.put_back, self._lasting = _lay_alike(operands)
        self._kept = operands.kept()
        self._copies = operands.copies
        self._grad_dtypes = list(map(_dtype, operands.grads))
        self._strides = list(map(Tensor.stride, operands.params))
        self._numels = list(map(Tensor.numel, operands.params))
        self._places = [list(map(Tensor.data_ptr, tensors)) for tensors in self._kept]
        self.steps = np.array(self._places[-1], np.int64)
        self.rows = self._rows(operands)

    def serve(self, operands: Operands) -> bool:
        """Whether they are right for these tensors, too; they then have the addresses of the new gradients.

        Written so that a tensor costs a microsecond: there may be ten thousand.
        """
        if not self._lasting or not _same(operands.copies, self._copies):
            return False
        for before, now, places in zip(self._kept, operands.kept(), self._places, strict=True):
            if not _same(before, now) or list(map(Tensor.data_ptr, now)) != places:
                return False
        for tensors in (operands.params, operands.grads):  # a parameter may have become a view of itself
            if list(map(Tensor.stride, tensors)) != self._strides or list(map(Tensor.numel, tensors)) != self._numels:
                return False
        if list(map(_dtype, operands.grads)) != self._grad_dtypes:
            return False
        self.rows["grad"][:-1] = list(map(Tensor.data_ptr, operands.grads))
        return True

    def _rows(self, operands: Operands) -> npt.NDArray[np.void]:
        table = np.zeros(len(self._numels) + 1, _ROW)
        rows = table[:-1]
        rows["numel"] = self._numels
        np.cumsum((rows["numel"] + 31) >> 5, out=table["first_word"][1:])
        columns: dict[str, Sequence[Tensor | None]] = {
            "param": operands.params,
            "grad": operands.grads,
            "exp_avg": operands.exp_avgs,
            "exp_avg_sq": operands.exp_avg_sqs,
            "copy": operands.copies or [None] * len(rows),
        }
        for position, (column, tensors) in enumerate(columns.items()):
            rows[column] = [address(tensor) for tensor in tensors]
            codes = [NO_COPY if tensor is None else CODES[tensor.dtype] for tensor in tensors]
            rows["dtypes"] += np.array(codes, np.int64) << 2 * position
        return table


def _same(before: Sequence[Tensor | None], now: Sequence[Tensor | None]) -> bool:
    return len(before) == len(now) and all(map(is_, before, now))


def _check(operands: Operands) -> None:
    checked: list[tuple[str, list[Tensor], tuple[torch.dtype, ...]]] = [
        ("gradient", operands.grads, DTYPES),
        ("exp_avg", operands.exp_avgs, DTYPES),
        ("exp_avg_sq", operands.exp_avg_sqs, DTYPES),
        ("step", operands.steps, (torch.float32,)),
    ]
    for name, tensors, dtypes in checked:
        for p, tensor in zip(operands.params, tensors, strict=True):
            shape = p.shape if name != "step" else ()
            if tensor.dtype not in dtypes or not tensor.is_cpu or tensor.shape != shape:
                kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise InputError(
                    f"CPUAdam.step: the {name} of a parameter {describe(p)} must be {kinds} of shape {tuple(shape)} on "
                    f"the CPU, got {describe(tensor)} on {tensor.device}; nothing was changed"
                )


def _lay_alike(operands: Operands) -> tuple[list[tuple[Tensor, Tensor]], bool]:
    """Put a copy in the place of each tensor that does not lie in memory as its parameter does, or that has gaps.

    Returns:
        Pairs of a tensor and its copy, for all that the step changes; and whether there was nothing to copy.
    """
    lists: list[list[Any]] = [operands.params, operands.grads, operands.exp_avgs, operands.exp_avg_sqs]
    if operands.copies:
        lists.append(operands.copies)
    put_back: list[tuple[Tensor, Tensor]] = []
    alike = True
    for index, p in enumerate(operands.params):
        strides = p.stride() if is_dense(p) else dense_like(p, p.dtype).stride()
        for tensors in lists:
            tensor = tensors[index]
            if tensor is None or tensor.stride() == strides:
                continue
            alike = False
            tensors[index] = torch.empty_strided(p.shape, strides, dtype=tensor.dtype).copy_(tensor)
            if tensors is not operands.grads:
                put_back.append((tensor, tensors[index]))
    return put_back, alike
