"""OnebitAdam's compressed step as a case: by fused kernels, by torch's operations, and beside torch's AdamW alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.yardsticks import packed
from onebit.comm import CompressedAllreduce, Residual
from onebit.comm.numbers import gather_numbers
from onebit.optim import OnebitAdam

OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


class ByOperations(OnebitAdam):
    """OnebitAdam without its fused kernels, so that they can be measured against what they replace."""

    def _fused_step(self, *arguments: Any) -> None:
        """There are none."""


@dataclass
class Training:
    """An optimizer after its warm-up, with the one parameter that it updates; the gradient stays the same.

    Attributes:
        exact: every operation of a step rounds as the check does, so results have the same bits.
    """

    setting: Setting
    param: Parameter
    optimizer: torch.optim.Optimizer
    exact: bool

    def run(self) -> None:
        """Make a step."""
        self.optimizer.step()

    def check(self) -> Callable[[], int]:
        """Remember everything; the function then makes the step again with the codec and NumPy, and compares."""
        if not self.exact or self.setting.backend.size == 1:
            return lambda: 0
        before, saved = self.param.detach().clone(), self.optimizer.state_dict()
        state, group = saved["state"][0], saved["param_groups"][0]
        residual = Residual()
        residual.load_state_dict(saved["onebit"]["residuals"][0])

        def wrong() -> int:
            setting = self.setting
            assert self.param.grad is not None
            momentum = state["exp_avg"] * OPTIONS["betas"][0]
            momentum += self.param.grad * (1 - OPTIONS["betas"][0])  # two roundings, as in the kernels
            CompressedAllreduce(
                momentum, setting.backend, setting.codec, bucket_mb=setting.bucket_mb, residual=residual
            )(momentum)
            expected = _updated(before, momentum, state["exp_avg_sq"], group["step"] + 1, float(state["variance_step"]))
            held = self.optimizer.state_dict()["state"][0]["exp_avg"]
            count = int((expected != self.param.detach().cpu()).sum()) + int((momentum != held).sum())
            digest = float(self.param.detach().view(torch.int32).sum(dtype=torch.int64))
            digests = gather_numbers(setting.backend, [digest])
            return count + (0 if digests[0] == digests[setting.backend.rank] else setting.numel)

        return wrong


def _updated(x: Tensor, momentum: Tensor, variance: Tensor, step: int, variance_step: float) -> Tensor:
    """The parameter after a step, each operation rounded once."""
    beta1, beta2 = OPTIONS["betas"]
    rate = np.float32(OPTIONS["lr"] / (1 - beta1**step))
    root = np.float32(1 / (1 - beta2**variance_step) ** 0.5)
    keep = np.float32(1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
    spread = np.sqrt(variance.cpu().numpy()) * root + np.float32(OPTIONS["eps"])
    return torch.from_numpy(x.cpu().numpy() * keep - rate * momentum.cpu().numpy() / spread)


def _problem(setting: Setting) -> Parameter:
    """A parameter that is the same on every rank, with this rank's gradient."""
    param = Parameter(setting.normal(0).float())
    param.grad = setting.normal().float()
    return param


def _onebit(make: type[OnebitAdam], exact: bool) -> Callable[[Setting], Training]:
    def inputs(setting: Setting) -> Training:
        param = _problem(setting)
        optimizer = make(
            [param],
            freeze_step=1,
            backend=setting.backend,
            codec=setting.codec,
            bucket_mb=setting.bucket_mb,
            **OPTIONS,
        )
        for _ in range(2):  # the warm-up, and a step that starts from its momentum
            optimizer.step()
        return Training(setting, param, optimizer, exact)

    return inputs


def _adamw(setting: Setting) -> Training:
    param = _problem(setting)
    return Training(setting, param, torch.optim.AdamW([param], fused=True, **OPTIONS), False)


def _moved(setting: Setting) -> float:
    """What AdamW itself reads and writes: parameter, gradient and two moments, so that ratios are those of times."""
    return 28.0 * setting.numel


def _wire(setting: Setting) -> float:
    """2(n - 1)/n of the payload."""
    return 2 * (setting.backend.size - 1) / setting.backend.size * packed(setting)


def _stages(state: Training) -> dict[str, float]:
    return dict(state.optimizer.stats.seconds) if isinstance(state.optimizer, OnebitAdam) else {}


STEPS: tuple[Case[Training], ...] = (
    Case(
        name="AdamW",
        summary="torch.optim.AdamW(fused=True) of this rank alone, without an average",
        family="steps",
        role="AdamW",
        moved=_moved,
        inputs=_adamw,
        run=Training.run,
        check=Training.check,
    ),
    Case(
        name="OnebitAdam by operations",
        summary="its compressed step and average, with torch's operations between the codec's kernels",
        family="steps",
        role="operations",
        moved=_moved,
        wire=_wire,
        inputs=_onebit(ByOperations, False),
        run=Training.run,
        stages=_stages,
        check=Training.check,
    ),
    Case(
        name="OnebitAdam",
        summary="its compressed step and average by fused kernels",
        family="steps",
        against=("AdamW", "operations"),
        moved=_moved,
        wire=_wire,
        inputs=_onebit(OnebitAdam, True),
        run=Training.run,
        stages=_stages,
        check=Training.check,
    ),
)
