"""One device's share of Adam's step: which tensors it reads and writes, looked up anew before every step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.optim.adam import MOMENTS, dense_like, is_dense
from onebit.optim.gpu.adam_step import MASTER, Kernels, Kind, Shapes, Step, Stepper

_NO_ELEMENTS = 1  # stands for the address of a gradient without elements, which has none but is not missing
_SAMPLES = 16  # a step looks up the moments of one in so many parameters, whatever else it knows

_moments = itemgetter(*MOMENTS)
Addresses = npt.NDArray[np.int64]


class AdamShare:
    """The parameters of one device that have a state.

    A step is `look`, `adopt` if something has moved, and `make`. Nothing that a user sees changes before `make`. Where
    there are many small tensors the host spends most of a step in `look`, waiting for the memory that Python's objects
    lie in. So it visits states only if somebody has touched them, and else a few at each step, which is enough to
    notice at once that all have been moved.

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
        self._looks = 0
        self._grads: list[Tensor | None] = []
        self._of_params = self._of_grads = np.zeros(0, np.int64)  # addresses
        self._of_samples: list[Addresses] = [self._of_params] * _SAMPLES  # likewise of moments
        # The moments that were adopted, two for each parameter, and the fp32 copies, one for each or none at all. Who
        # takes them out of the states, to another device for instance, frees their memory.
        self._known: list[weakref.ref[Tensor]] = []
        self._masters: list[weakref.ref[Tensor] | None] = []
        self._moved_memory = self._moved_grads = True
        self._memory: list[int] = []
        self._gradients: list[int] = []
        self._gradient_dtypes = [p.dtype for p in params]
        self._gaps: list[int] = []  # of which parameters the memory has gaps
        self._contiguous = False  # the moments of all of them are
        self._steppers: dict[Shapes, Stepper] = {}  # none is dropped, for a captured graph may refer to its tables
        self._stepper: Stepper

    def look(self, touched: bool) -> bool:
        """Find all tensors; returns whether one has moved since the last step, so that all have to be checked.

        touched: somebody may have put other tensors into a state.
        """
        self._grads = [p.grad for p in self._params]
        params, grads = _addresses(self._params), _addresses(self._grads)
        sample = self._looks % _SAMPLES
        self._moved_memory = (
            self._moved_memory
            or not np.array_equal(params, self._of_params)
            or not np.array_equal(self._sampled(sample), self._of_samples[sample])
            or (touched and not self._same_references())
        )
        self._moved_grads = self._moved_grads or not np.array_equal(grads, self._of_grads)
        self._of_params, self._of_grads = params, grads
        self._looks += 1
        return self._moved_memory or self._moved_grads

    def adopt(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Prepare for what `look` has found, parameters and gradients having been checked."""
        before = self._gradient_dtypes
        self._gradient_dtypes = [dtype if g is None else g.dtype for g, dtype in zip(self._grads, before, strict=True)]
        self._gradients = self._of_grads.tolist()
        if self._moved_memory:
            self._adopt_memory(groups)
        if self._moved_memory or self._gradient_dtypes != before:
            rows = zip(self._params, self._gradient_dtypes, self._states, strict=True)
            kinds = tuple(Kind(p.dtype, dtype, MASTER in state) for p, dtype, state in rows)
            shapes = Shapes(tuple(p.numel() for p in self._params), kinds, tuple(self._groups))
            if shapes not in self._steppers:
                self._steppers[shapes] = self._kernels(shapes, self._steps)
            self._stepper = self._steppers[shapes]
        self._moved_memory = self._moved_grads = False

    def _adopt_memory(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for p, state, group in zip(self._params, self._states, self._groups, strict=True):
            _fit(p, state, groups[group]["master_weights"])
        first, second = ([state[key] for state in self._states] for key in MOMENTS)
        masters = [state.get(MASTER) for state in self._states]
        self._known = [weakref.ref(t) for pair in zip(first, second, strict=True) for t in pair]
        found = [None if t is None else weakref.ref(t) for t in masters]
        self._masters = found if any(found) else []
        self._of_samples = [self._sampled(sample) for sample in range(_SAMPLES)]
        rows = [self._of_params, _addresses(first), _addresses(second), _addresses(masters)]
        self._memory = np.concatenate(rows).tolist()
        self._contiguous = all(map(Tensor.is_contiguous, first))
        self._gaps = [i for i, (p, m) in enumerate(zip(self._params, first, strict=True)) if _order(p) != _order(m)]

    def make(self, groups: Sequence[Mapping[str, Any]], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Make the step with what `look` has found."""
        scaler = [None if t is None else _scalar(t, self._steps.device) for t in (found_inf, grad_scale)]
        step = Step(self._params, self._grads, self._states, self._memory, self._gradients, groups, *scaler)
        gaps, others = self._elsewhere()
        self._stepper(_moved(step, gaps, others) if gaps or others else step)
        for index, copy in gaps.items():
            self._params[index].copy_(copy)
        for index in others:
            if (g := self._grads[index]) is not None and groups[self._groups[index]]["zero_gradients"]:
                g.zero_()
        rows = zip(self._params, self._grads, strict=True)
        updated = self._params if self._of_grads.all() else [p for p, g in rows if g is not None]
        torch.autograd.graph.increment_version(updated)
        self._grads = []  # who else lets go of a gradient frees its memory

    def _same_references(self) -> bool:
        """Whether the states hold the tensors that were adopted."""
        moments = chain.from_iterable(map(_moments, self._states))
        masters = (state.get(MASTER) for state in self._states)
        return all(t is known() for t, known in zip(moments, self._known, strict=False)) and all(
            t is (known and known()) for t, known in zip(masters, self._masters, strict=False)
        )

    def _sampled(self, sample: int) -> Addresses:
        """Addresses of the moments of some of the parameters."""
        return _addresses(list(chain.from_iterable(map(_moments, self._states[sample::_SAMPLES]))))

    def _elsewhere(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Copies of the parameters and of the gradients whose elements lie in another order than the moments'."""
        params, grads = {}, {}
        for index in self._gaps:
            if self._grads[index] is not None:
                p = self._params[index]
                params[index] = dense_like(p, p.dtype).copy_(p)
        given = self._grads if self._of_grads.all() else [g for g in self._grads if g is not None]
        if not (self._contiguous and all(map(Tensor.is_contiguous, given))):  # type: ignore[arg-type]
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


def _addresses(tensors: Sequence[Tensor | None]) -> Addresses:
    """Of all elements; 0 for None."""
    try:
        found = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))  # type: ignore[arg-type]
    except TypeError:  # one is None
        return np.array([0 if t is None else t.data_ptr() or _NO_ELEMENTS for t in tensors], np.int64)
    found[found == 0] = _NO_ELEMENTS
    return found


def _scalar(t: Tensor, device: torch.device) -> Tensor:
    """One fp32 number on a device; the host does not wait for it."""
    return t.reshape(()).to(device, torch.float32, non_blocking=True)


def _order(t: Tensor) -> tuple[int, ...]:
    """The strides that matter."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
