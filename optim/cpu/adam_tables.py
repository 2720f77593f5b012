"""Where the tensors of an Adam step lie in memory, as the compiled loops read it; made anew only when one has moved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_, itemgetter
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
_TENSORS = itemgetter("exp_avg", "exp_avg_sq", "step")

States = Mapping[Tensor, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Operands:
    """The tensors of a step; entry i of each list belongs to parameter i, and all but its step have its shape.

    Attributes:
        copies: what takes the parameter's new value in bf16 or fp16, or None; an empty list: nobody wants any.
        steps: 0-dim fp32.
        counts: how many of the parameters, in order, are each group's.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    copies: list[Tensor | None]
    counts: list[int]


class Tables:
    """The tables of one step, and of those after it for as long as only gradients move.

    Attributes:
        rows: COLUMNS of each tensor, and one row more that says at which word the last tensor ends.
        steps: addresses of the counts of steps.
        counts: how many of the rows, in order, are each group's.
        put_back: pairs of a tensor and of the copy that the step changes in its place, because it lies in memory in
            another order than its parameter, or with gaps.
        lasting: whether later steps may ask them to `serve`; others hold copies of gradients.
    """

    def __init__(self, operands: Operands, every: Sequence[Tensor], state: States) -> None:
        """Make them for `operands`, whose lists get copies of what has to lie otherwise.

        Args:
            every: the optimizer's parameters, those without a gradient too.
            state: the optimizer's.

        Raises:
            InputError: a gradient or a state is not what the loops would take it for.
        """
        _check(operands)
        self._every = list(every)
        self._absent = [p for p in every if p.grad is None]
        self._params = list(operands.params)
        self._owners, self._entries = list(state), list(state.values())
        self._states = [state[p] for p in self._params]
        self._kept = list(chain.from_iterable(map(_TENSORS, self._states)))
        self._copies = [copy for copy in operands.copies if copy is not None]
        self._movable = [*operands.exp_avgs, *operands.exp_avg_sqs, *self._copies]
        self.lasting = all(map(Tensor.is_contiguous, (*self._params, *operands.grads, *self._movable)))
        self._places = list(map(Tensor.data_ptr, self._movable))
        self._param_places = list(map(Tensor.data_ptr, self._params))
        self._numels = list(map(Tensor.numel, self._params))
        self._grad_dtypes = [grad.dtype for grad in operands.grads]
        self.put_back = _lay_alike(operands)
        self.steps = np.array([address(step) for step in operands.steps], np.int64)
        self.rows = self._rows(operands)
        self.counts = operands.counts
        self._copied = None if self.lasting else operands  # alive for as long as their addresses are in use

    def serve(self, every: Sequence[Tensor], state: States) -> bool:
        """Whether they are right for the next step, too; they then have the addresses of the new gradients.

        There may be ten thousand tensors, more than a cache holds: each is looked at in one go, as rarely as possible,
        and no object is made for it that Python's garbage collector would have to look at.

        Args:
            every: the optimizer's parameters.
            state: the optimizer's.
        """
        if not (_same(every, self._every) and all(p.grad is None for p in self._absent)):
            return False
        if not (_same(state, self._owners) and _same(state.values(), self._entries)):
            return False
        if not all(map(is_, chain.from_iterable(map(_TENSORS, self._states)), self._kept)):
            return False
        if list(map(Tensor.data_ptr, self._movable)) != self._places:
            return False
        expected = zip(self._params, self._param_places, self._numels, self._grad_dtypes, strict=True)
        try:
            grads = [
                g.data_ptr()
                if (g := p.grad) is not None
                and p.data_ptr() == place
                and p.numel() == numel == g.numel()
                and g.dtype is dtype
                and g.is_contiguous()
                and g.is_cpu
                else None
                for p, place, numel, dtype in expected
            ]
        except RuntimeError:  # a sparse gradient has no address
            return False
        if None in grads:
            return False
        self.rows["grad"][:-1] = grads
        return True

    def _rows(self, operands: Operands) -> npt.NDArray[np.void]:
        table = np.zeros(len(operands.params) + 1, _ROW)
        rows = table[:-1]
        rows["numel"] = list(map(Tensor.numel, operands.params))
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


def _same(now: Collection[object], before: Collection[object]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


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


def _lay_alike(operands: Operands) -> list[tuple[Tensor, Tensor]]:
    """Put a copy in the place of each tensor that does not lie in memory as its parameter does, or that has gaps.

    Returns:
        Pairs of a tensor and its copy, for all that the step changes.
    """
    lists: list[list[Any]] = [operands.params, operands.grads, operands.exp_avgs, operands.exp_avg_sqs]
    if operands.copies:
        lists.append(operands.copies)
    put_back: list[tuple[Tensor, Tensor]] = []
    for index, p in enumerate(operands.params):
        like = p if is_dense(p) else dense_like(p, p.dtype)
        for tensors in lists:
            tensor = tensors[index]
            if tensor is None or _order(tensor) == _order(like):
                continue
            tensors[index] = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype).copy_(tensor)
            if tensors is not operands.grads:
                put_back.append((tensor, tensors[index]))
    return put_back


def _order(tensor: Tensor) -> list[int]:
    """The strides that tell where elements lie."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
