"""One device's share of Adam's step: which tensors it reads and writes, looked up anew before every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from onebit.optim.adam import MOMENTS, dense_like, is_dense
from onebit.optim.gpu.adam_step import MASTER, Kernels, Kind, Shapes, Step, Stepper

_NO_ELEMENTS = 1  # stands for the address of a gradient without elements, which has none but is not missing

Strides = list[tuple[int, ...]]


@dataclass(frozen=True)
class _Place:
    """Where everything lies: addresses as in `Step`, and strides of the gradients (of the moments if there is none)."""

    memory: list[int]
    gradients: list[int]
    strides: Strides


class AdamShare:
    """The parameters of one device that have a state.

    A step is `look`, `adopt` if something has moved, and `make`. Nothing that a user sees changes before `make`.

    Args:
        params: (k,) parameters, all on one device.
        states: (k,) their entries of the optimizer's state; `step` of each becomes a view of one tensor of all counts.
        groups: (k,) the number of each parameter's group.
        kernels: what the steps are made with.
    """

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]], groups: list[int], kernels: Kernels) -> None:
        self._params, self._states, self._groups, self._kernels = params, states, groups, kernels
        self._steps = _together([state["step"] for state in states], params[0].device)
        for state, step in zip(states, self._steps.unbind(), strict=True):
            state["step"] = step
        self._strides: Strides = [p.stride() for p in params]
        self._gradient_dtypes = [p.dtype for p in params]
        self._masters = False
        self._stepper: Stepper
        self._gaps: list[int] = []  # of which parameters the memory has gaps
        self._grads: list[Tensor | None] = []
        self._seen = self._place = _Place([], [], [])
        self._steppers: dict[Shapes, Stepper] = {}  # none is dropped, for a captured graph may refer to its tables

    def look(self) -> bool:
        """Find all tensors; returns whether one has moved since the last step, so that all have to be checked."""
        self._grads = grads = [p.grad for p in self._params]
        moments = [map(itemgetter(key), self._states) for key in MOMENTS]
        memory = list(map(Tensor.data_ptr, chain(self._params, *moments)))
        masters = [state.get(MASTER) for state in self._states] if self._masters else []
        memory += [0 if t is None else t.data_ptr() for t in masters] or [0] * len(grads)
        gradients = [0 if g is None else g.data_ptr() or _NO_ELEMENTS for g in grads]
        strides = [of if g is None else g.stride() for g, of in zip(grads, self._strides, strict=True)]
        self._place = _Place(memory, gradients, strides)
        return memory != self._seen.memory or gradients != self._seen.gradients

    def adopt(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Prepare for what `look` has found, parameters and gradients having been checked."""
        if self._place.memory != self._seen.memory:
            for p, state, group in zip(self._params, self._states, self._groups, strict=True):
                _fit(p, state, groups[group]["master_weights"])
            self._masters = any(MASTER in state for state in self._states)
            self._strides = [state[MOMENTS[0]].stride() for state in self._states]
            self._gaps = [i for i, p in enumerate(self._params) if _order(p) != _order(self._states[i][MOMENTS[0]])]
            self.look()
        before = zip(self._grads, self._gradient_dtypes, strict=True)
        self._gradient_dtypes = [dtype if g is None else g.dtype for g, dtype in before]
        rows = zip(self._params, self._gradient_dtypes, self._states, strict=True)
        kinds = [Kind(p.dtype, dtype, MASTER in state) for p, dtype, state in rows]
        shapes = Shapes(tuple(p.numel() for p in self._params), tuple(kinds), tuple(self._groups))
        if shapes not in self._steppers:
            self._steppers[shapes] = self._kernels(shapes, self._steps)
        self._stepper = self._steppers[shapes]

    def make(self, groups: Sequence[Mapping[str, Any]], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Make the step with what `look` has found."""
        self._seen = self._place
        scaler = [None if t is None else _scalar(t, self._steps.device) for t in (found_inf, grad_scale)]
        place = self._place
        step = Step(self._params, self._grads, self._states, place.memory, place.gradients, groups, *scaler)
        gaps, others = self._elsewhere()
        self._stepper(_moved(step, gaps, others) if gaps or others else step)
        for index, copy in gaps.items():
            self._params[index].copy_(copy)
        for index in others:
            if (g := self._grads[index]) is not None and groups[self._groups[index]]["zero_gradients"]:
                g.zero_()
        updated = [p for p, g in zip(self._params, self._grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(updated)

    def _elsewhere(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Copies of the parameters and of the gradients whose elements lie in another order than the moments'."""
        params, grads = {}, {}
        for index in self._gaps:
            if self._grads[index] is not None:
                p = self._params[index]
                params[index] = dense_like(p, p.dtype).copy_(p)
        if self._place.strides != self._strides:
            for index, g in enumerate(self._grads):
                moment = self._states[index][MOMENTS[0]]
                if g is not None and _order(g) != _order(moment):
                    grads[index] = torch.empty_like(moment, dtype=g.dtype).copy_(g)
        return params, grads


def _moved(step: Step, params: Mapping[int, Tensor], grads: Mapping[int, Tensor]) -> Step:
    """The same step with some parameters and gradients in other memory."""
    memory, gradients = list(step.memory), list(step.gradients)
    for index, p in params.items():
        memory[index] = p.data_ptr()
    for index, g in grads.items():
        gradients[index] = g.data_ptr()
    return replace(
        step,
        params=[params.get(index, p) for index, p in enumerate(step.params)],
        grads=[grads.get(index, g) for index, g in enumerate(step.grads)],
        memory=memory,
        gradients=gradients,
    )


def _fit(p: Tensor, state: dict[str, Any], master_weights: bool) -> None:
    """Give a state the tensors that the kernels need: fp32, where the parameter is, in one memory order."""
    keys = [*MOMENTS]
    if master_weights and p.dtype != torch.float32:
        state.setdefault(MASTER, p.detach())
        keys.append(MASTER)
    else:
        state.pop(MASTER, None)
    dense = is_dense(p)
    for key in keys:
        t = state[key]
        ordered = t.stride() == p.stride() if dense else t.is_contiguous()
        if not ordered or t.dtype != torch.float32 or t.device != p.device or t.shape != p.shape:
            state[key] = dense_like(p, torch.float32).copy_(t)


def _together(steps: Sequence[Tensor], device: torch.device) -> Tensor:
    """(k,) fp32 on a device: the counts, each of which may lie elsewhere."""
    if not all(step.is_cpu for step in steps):
        steps = [step.to(device) for step in steps]
    return torch.stack([step.reshape(()) for step in steps]).to(device, torch.float32)


def _scalar(t: Tensor, device: torch.device) -> Tensor:
    """One fp32 number on a device; the host does not wait for it."""
    return t.reshape(()).to(device, torch.float32, non_blocking=True)


def _order(t: Tensor) -> tuple[int, ...]:
    """The strides that matter."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
