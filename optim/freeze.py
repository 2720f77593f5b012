"""When the variance is frozen: at a given step, or once its norm has become stable."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

AUTO = "auto"
THRESHOLD = 0.96
SAMPLES = 16  # measurements per Δ = 1/(1-β₂) steps; each reads the variance once more

# What a group's progress towards the freeze starts as; see `CompressedOptimizer._progress`. The history is empty, or
# the last learning rate, the last step at which it rose, and pairs of a step and the variance's norm after it.
PROGRESS: dict[str, Any] = {"frozen_at": None, "freeze_history": ()}


def frozen_since(group: Mapping[str, Any]) -> int | None:
    """The number of warm-up steps of a group; None: not known yet, or none will ever freeze it (``compress=False``)."""
    if not group["compress"]:
        return None
    at: int | None = group["frozen_at"] if group["freeze_step"] == AUTO else group["freeze_step"]
    return at


def is_frozen(group: Mapping[str, Any], step: int) -> bool:
    """Whether the step after the first `step` ones has a frozen variance; a function of options and progress alone."""
    at = frozen_since(group)
    return at is not None and step >= at


def measure(group: Mapping[str, Any], states: Sequence[Mapping[str, Tensor]], device: torch.device) -> Tensor | None:
    """What `observe` must be told of the variance before a warm-up step: a 0-dim fp32 tensor; None: nothing.

    It is ‖v̂‖₁, v̂ = v/(1-β₂ᵗ), where a measurement is due, else 0. The mean of all ranks' is to be told, for ranks that
    add up in another order may not measure the same last bit.
    """
    if not group["compress"] or group["freeze_step"] != AUTO:
        return None
    beta2 = group["betas"][1]
    known = [s for s in states if s and s["exp_avg_sq"].numel() and float(s["variance_step"]) > 0]
    if not known or group["step"] % _spacing(beta2)[0]:
        return torch.zeros((), device=device)
    norms = torch.stack(torch._foreach_norm([s["exp_avg_sq"] for s in known], 1))
    corrections = torch.tensor([1 / (1 - beta2 ** float(s["variance_step"])) for s in known], device=device)
    return (norms * corrections).sum()


def observe(group: dict[str, Any], norm: float, rank: int) -> None:
    """Take note of a warm-up step that was made, and freeze the variance after it if it is stable.

    Stable, after Tang et al. 2021 (arXiv 2102.02888): ‖v_{t-Δ}‖₁ is within 4 % of ‖v_t‖₁, Δ = 1/(1-β₂), with a learning
    rate that has not risen since. The norms are of the bias-corrected variance: v itself grows from 0, so its ratio
    would exceed every threshold at once. And either may be the larger, for a variance that grows is not stable.

    Args:
        group: its step count is already that of the step.
        norm: what all ranks had from `measure`, averaged.
        rank: rank 0 logs.
    """
    step = group["step"]
    last, rose, norms = group["freeze_history"] or (0.0, 0, ())
    lr = float(group["lr"])
    if lr > last * (1 + 1e-9):  # more than what rounding adds to a schedule
        rose = step
    stride, window = _spacing(group["betas"][1])
    ratio = 0.0
    if (step - 1) % stride == 0 and norm > 0:
        before = dict(norms).get(step - 1 - window)
        ratio = norm / before if before else 0.0
        norms = (*(pair for pair in norms if pair[0] >= step - 1 - window + stride), (step - 1, norm))
        if step - 1 - window >= rose and THRESHOLD <= ratio <= 1 / THRESHOLD:
            group["frozen_at"], group["freeze_history"] = step, ()
            if rank == 0:
                _log.info(
                    "variance frozen after step %d: its norm is %.4f times that of %d steps before",
                    step,
                    ratio,
                    window,
                )
            return
    group["freeze_history"] = (lr, rose, norms)
    if rank == 0 and group["total_steps"] and step == group["total_steps"] // 2:
        _log.warning(
            "half of %d steps are over and the variance is not stable: nothing is compressed yet; a smaller betas[1] "
            "shortens the time that is looked at, 1/(1 - betas[1]) steps; freeze_step=<int> decides without looking",
            group["total_steps"],
        )


def warn_if_too_late(owner: str, group: Mapping[str, Any]) -> None:
    """Log a warning if a training of ``total_steps`` steps is certain to end before its variance is frozen."""
    total = group["total_steps"]
    if total is None or not group["compress"]:
        return
    auto = group["freeze_step"] == AUTO
    earliest = _spacing(group["betas"][1])[1] + 2 if auto else group["freeze_step"]
    if earliest >= total:
        _log.warning(
            "%s: training ends after %d steps and the variance is frozen after step %d%s: nothing will be compressed",
            owner,
            total,
            earliest,
            " at the earliest, 1/(1 - betas[1]) steps after the first measurement" if auto else "",
        )


def _spacing(beta2: float) -> tuple[int, int]:
    """Steps from one measurement to the next, and the whole number of those that comes next to Δ from below."""
    delta = max(round(1 / (1 - beta2)), 1)
    stride = max(delta // SAMPLES, 1)
    return stride, delta // stride * stride
