"""Optimizers that average gradients exactly until their variance is frozen, and momentum compressed from then on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from onebit.optim.freeze import PROGRESS, is_frozen, warn_if_too_late
from onebit.optim.fused_groups import FusedGroups
from onebit.optim.options import check_adam_options, check_count, check_flags, check_freeze_step, check_number


class Freezing(FusedGroups):
    """Base of these: 1-bit Adam and 1-bit LAMB; their groups have `freeze_step` and what goes with it."""

    _progress: ClassVar[Mapping[str, Any]] = {"step": 0, **PROGRESS}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        warn_if_too_late(type(self).__name__, self.param_groups[-1])

    def _check_options(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        check_adam_options(name, group)
        check_flags(name, group, "bias_correction", "maximize")
        check_freeze_step(name, group["freeze_step"])
        check_count(name, "total_steps", group["total_steps"], "the length of the training")
        check_number(name, "variance_floor", group["variance_floor"], 0.0, 1.0)

    def _planned(self, group: Mapping[str, Any], step: int) -> str:
        if not group["compress"]:
            return "dense"
        return "compressed" if is_frozen(group, step) else "warmup"

    def _averages(self, group: Mapping[str, Any]) -> bool:
        return self._planned(group, group["step"]) != "compressed"

    def _is_staged(self, group: Mapping[str, Any]) -> bool:
        return True
