"""Adam's step on CUDA tensors by torch's own fused kernel, where CuPy is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from onebit.optim.gpu.adam_step import MASTER, Shapes, Step


class TorchSteps:
    """As `AdamLaunches`; what is not fp32 goes through temporary copies, for torch's kernel takes one dtype.

    Args:
        shapes: of k tensors.
        steps: (k,) fp32 on their device: how many steps each tensor has made, counted on.
    """

    def __init__(self, shapes: Shapes, steps: Tensor) -> None:
        self._groups, self._steps = shapes.groups, steps.unbind()

    def __call__(self, step: Step) -> None:
        """Start the kernels on the current stream; the host does not wait."""
        here = [index for index, g in enumerate(step.grads) if g is not None]
        for number in dict.fromkeys(self._groups[index] for index in here):
            self._update(step, step.groups[number], [index for index in here if self._groups[index] == number])

    def _update(self, step: Step, group: Mapping[str, Any], members: Sequence[int]) -> None:
        params, states = [step.params[i] for i in members], [step.states[i] for i in members]
        grads = [g for i in members if (g := step.grads[i]) is not None]
        values = [s.get(MASTER, p.detach().float()) for p, s in zip(params, states, strict=True)]
        steps = [self._steps[i] for i in members]
        beta1, beta2 = group["betas"]
        update = adamw if group["adam_w_mode"] else adam
        update(
            values,
            [g.float() for g in grads],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            steps if group["bias_correction"] else [torch.full_like(t, torch.inf) for t in steps],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            grad_scale=step.grad_scale,
            found_inf=step.found_inf,
        )
        if not group["bias_correction"]:
            torch._foreach_add_(steps, 1.0 if step.found_inf is None else 1.0 - step.found_inf)
        rounded = [(p, value) for p, value in zip(params, values, strict=True) if p.data_ptr() != value.data_ptr()]
        for p, value in rounded:
            p.copy_(value)
        if group["zero_gradients"]:
            torch._foreach_zero_(grads)
