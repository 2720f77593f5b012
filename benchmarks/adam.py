"""Adam steps as cases: ours beside torch's own implementations and, where it is installed, DeepSpeedCPUAdam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.benchmarks import machine
from onebit.benchmarks.case import Case, Setting
from onebit.compress import set_num_threads
from onebit.optim import CPUAdam, FusedAdam

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
MANY = 1000  # elements of each of many tensors

# A value is rounded to its dtype by at most this part of it, and by no more than so many roundings of fp32 before that:
# on CUDA roots and quotients are approximations, each as good as four roundings.
ROUNDINGS = {"cpu": 8, "cuda": 32}
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SPAN = 1 << 20  # elements that are compared at once, in float64

Make = Callable[[list[Parameter]], torch.optim.Optimizer]


@dataclass
class Step:
    """An optimizer with its parameters, which have gradients.

    Attributes:
        alone: this rank makes the step with all cores, or not at all; else every rank makes its own with its share.
        roundings: how often a result may be rounded to the dtype of the parameter on the way.
    """

    setting: Setting
    params: list[Parameter]
    optimizer: torch.optim.Optimizer
    alone: bool = False
    roundings: int = 1
    before: list[Tensor] = field(default_factory=list)

    def run(self) -> None:
        """Make it."""
        if not self.alone:
            self.optimizer.step()
        elif self.setting.backend.rank == 0:
            set_num_threads(machine.cores())
            try:
                self.optimizer.step()
            finally:
                set_num_threads(None)

    def check(self) -> Callable[[], int]:
        """Remember parameters and moments; the function then counts the elements that differ from a float64 step."""
        if self.alone and self.setting.backend.rank:
            return lambda: 0
        before = self._read()
        return lambda: self._wrong(before, self._read())

    def _read(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Parameters, gradients and both moments, each in one row, and the count of steps."""
        states = [self.optimizer.state[p] for p in self.params]
        mean, square = (_flat([state[key] for state in states]) for key in ("exp_avg", "exp_avg_sq"))
        grads = [p.grad for p in self.params if p.grad is not None]
        return _flat(self.params), _flat(grads), mean, square, float(states[0]["step"])

    def _wrong(self, before: tuple[Any, ...], after: tuple[Any, ...]) -> int:
        count = 0
        (p, g, m, v, _), step = before, after[-1]
        beta1, beta2 = OPTIONS["betas"]
        for first in range(0, p.numel(), SPAN):
            parts = (t[first : first + SPAN].cpu().double().numpy() for t in (p, g, m, v, after[0]))
            values, grad, mean, square, got = parts
            square = beta2 * square + (1 - beta2) * grad * grad
            spread = np.sqrt(square / (1 - beta2**step)) + OPTIONS["eps"]
            rate = OPTIONS["lr"] / (1 - beta1**step) / spread
            wanted = values * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
            wanted -= rate * (beta1 * mean + (1 - beta1) * grad)
            size = np.abs(values) + rate * (beta1 * np.abs(mean) + (1 - beta1) * np.abs(grad))
            slack = self.roundings * HALF_UNIT[p.dtype] * np.abs(wanted)
            slack += ROUNDINGS[p.device.type] * HALF_UNIT[torch.float32] * size
            if self.roundings > 1:  # what is rounded on the way may be larger than the result
                slack += self.roundings * HALF_UNIT[p.dtype] * size
            count += int(np.sum(~(np.abs(got - wanted) <= 1.01 * slack)))
        return count


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@dataclass(frozen=True)
class Contestant:
    """One implementation.

    Attributes:
        role: what others are measured against it as; empty for ours.
        roundings: as of `Step`.
        on_cuda: the same on CUDA, where it is another number.
    """

    name: str
    summary: str
    role: str
    make: Make
    roundings: int = 1
    on_cuda: int | None = None

    def roundings_on(self, device: torch.device) -> int:
        """How often a result may be rounded there."""
        return self.on_cuda if self.on_cuda is not None and device.type == "cuda" else self.roundings


def _torch(**how: Any) -> Make:
    return lambda params: torch.optim.AdamW(params, **OPTIONS, **how)


def _deepspeed(params: list[Parameter]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # type: ignore[import-not-found, unused-ignore]

    made: torch.optim.Optimizer = DeepSpeedCPUAdam(params, adamw_mode=True, fp32_optimizer_states=False, **OPTIONS)
    return made


def _ours(**options: Any) -> Make:
    """CPUAdam or, where the parameters are on CUDA, FusedAdam, whose moments are always float32."""

    def make(params: list[Parameter]) -> torch.optim.Optimizer:
        if params[0].is_cuda:
            return FusedAdam(params, **OPTIONS)
        return CPUAdam(params, **OPTIONS, **options)

    return make


TORCH = (
    # On CUDA its bias corrections are float32, and in the first steps 1 - 0.999ᵗ has lost some of its digits.
    Contestant("torch fused", "torch.optim.AdamW(fused=True)", "fused", _torch(fused=True), on_cuda=512),
    Contestant("torch foreach", "torch.optim.AdamW(foreach=True)", "foreach", _torch(foreach=True), roundings=16),
    Contestant("torch for-loop", "torch.optim.AdamW(foreach=False)", "for-loop", _torch(foreach=False), roundings=16),
)
DEEPSPEED = Contestant("DeepSpeedCPUAdam", "DeepSpeed's, moments in the parameter's dtype", "DeepSpeed", _deepspeed)
# Moments in the parameter's dtype, as torch has them, so that all move the same bytes.
OURS = Contestant("CPUAdam", "moments in its dtype; on CUDA FusedAdam", "", _ours(fp32_optimizer_states=False))


def contest(contestants: Sequence[Contestant], *, many: bool = False) -> list[Case[Step]]:
    """Cases in which every one makes the same step, of one tensor or of `many` with MANY elements each."""

    def case(one: Contestant) -> Case[Step]:
        return Case(
            name=one.name + (f", tensors of {MANY:,}" if many else ""),
            summary=one.summary,
            family="adam",
            role=one.role,
            against=() if one.role else tuple(other.role for other in contestants if other.role),
            moved=lambda setting: 7.0 * setting.numel * setting.dtype.itemsize,
            inputs=lambda setting: _inputs(
                setting, one.make, setting.dtype, MANY if many else None, one.roundings_on(setting.device)
            ),
            run=Step.run,
            check=Step.check,
        )

    return [case(one) for one in contestants]


ADAM: tuple[Case[Step], ...] = tuple(contest((OURS, *TORCH)))


def mixed() -> list[Case[Step]]:
    """A step of bf16 parameters with fp32 moments beside one that is all fp32; at a setting of fp32."""
    return [
        Case(
            name="CPUAdam, bfloat16 with float32 moments" if dtype == torch.bfloat16 else "CPUAdam",
            summary="bytes per second of 16-bit parameters and gradients",
            family="adam-mixed",
            role="" if dtype == torch.bfloat16 else "all float32",
            against=("all float32",) if dtype == torch.bfloat16 else (),
            moved=lambda setting, dtype=dtype: (16.0 + 3 * dtype.itemsize) * setting.numel,  # type: ignore[misc]
            inputs=lambda setting, dtype=dtype: _inputs(setting, _ours(), dtype),  # type: ignore[misc]
            run=Step.run,
            check=Step.check,
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _inputs(setting: Setting, make: Make, dtype: torch.dtype, size: int | None = None, roundings: int = 1) -> Step:
    values = setting.normal().to(dtype)
    grads = replace(setting, dtype=dtype, seed=setting.seed + 1000).normal()
    if size is None:
        params, of_params = [Parameter(values)], [grads]
    else:
        params = [Parameter(piece.clone()) for piece in torch.split(values, size)]
        of_params = [piece.clone() for piece in torch.split(grads, size)]
    for p, g in zip(params, of_params, strict=True):
        p.grad = g
    return Step(setting, params, make(params), roundings=roundings)


def _part(setting: Setting) -> Step:
    """Each rank's own part of the elements."""
    part = replace(setting, numel=max(1, setting.numel // setting.backend.size))
    return _inputs(part, _ours(), torch.float32)


def _whole(setting: Setting) -> Step:
    step = _inputs(setting, _ours(), torch.float32)
    step.alone = True
    return step


# Both make the same number of elements step once: all ranks a part each, or one rank all of it with all cores.
ADAM_RANKS: tuple[Case[Step], ...] = (
    Case(
        name="adam-one-rank",
        summary="CPUAdam on rank 0 with all cores",
        family="adam-ranks",
        devices=("cpu",),
        role="one rank",
        moved=lambda setting: 28.0 * setting.numel,
        inputs=_whole,
        run=Step.run,
        check=Step.check,
    ),
    Case(
        name="adam-every-rank",
        summary="CPUAdam on every rank with its share of the cores",
        family="adam-ranks",
        devices=("cpu",),
        against=("one rank",),
        moved=lambda setting: 28.0 * setting.numel,
        inputs=_part,
        run=Step.run,
        check=Step.check,
    ),
)
