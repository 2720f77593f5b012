"""When 0/1 Adam updates its variance and when its ranks meet: two schedules, each a pure function of the step.

Steps are counted from 1. Nothing is remembered from step to step, so a resumed run needs no saved schedule.
Schedules: Lu et al. 2022, arXiv 2202.06009, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from onebit.compress import InputError

_OPTIONS = ("compress", "var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper")


@dataclass(frozen=True, kw_only=True)
class _Policy:
    """Counts that are ints of at least 1."""

    var_freeze_step: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise InputError(f"ZeroOneAdam: {field.name} must be an int of at least 1, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class VariancePolicy(_Policy):
    """Variance steps: step 1, then gaps of 2^⌊j / var_update_scaler⌋ after the j-th (from 0), up to var_freeze_step.

    Args:
        var_freeze_step: the last step that may update the variance; at least 1.
        var_update_scaler: how many gaps have one length before it doubles; at least 1.

    Raises:
        InputError: a count is no int of at least 1.
    """

    var_update_scaler: int = 16

    def updates(self, step: int) -> bool:
        """Whether `step` updates the variance."""
        gap, past = self._place(step)
        return 1 <= step <= self.var_freeze_step and past % gap == 0

    def count(self, step: int) -> int:
        """How many of the steps 1 to `step` update the variance."""
        step = min(step, self.var_freeze_step)
        if step < 1:
            return 0
        gap, past = self._place(step)
        return self.var_update_scaler * (gap.bit_length() - 1) + past // gap + 1

    def _place(self, step: int) -> tuple[int, int]:
        """The length of the gaps around a step, and how far it is past the first variance step with such a gap."""
        gap = 1 << (max(step - 1, 0) // self.var_update_scaler + 1).bit_length() - 1
        return gap, step - 1 - self.var_update_scaler * (gap - 1)


@dataclass(frozen=True, kw_only=True)
class SyncPolicy(_Policy):
    """Synchronised steps: all up to var_freeze_step; then gaps of 1 that double every local_step_scaler steps.

    So every variance step is a synchronised step. A gap that has begun is kept to its end, hence gaps never shrink.

    Args:
        var_freeze_step: the last step that may update the variance; at least 1.
        local_step_scaler: steps after which the gap doubles; at least 1.
        local_step_clipper: the longest gap; at least 1.

    Raises:
        InputError: a count is no int of at least 1.
    """

    local_step_scaler: int = 32678
    local_step_clipper: int = 16

    def synchronises(self, step: int) -> bool:
        """Whether the ranks meet at `step`."""
        return step >= 1 and self.count(step) > self.count(step - 1)

    def count(self, step: int) -> int:
        """How many of the steps 1 to `step` are synchronised."""
        frozen = step - self.var_freeze_step
        total = max(min(step, self.var_freeze_step), 0)
        for start, gap, end in self._stretches():
            if frozen <= start:
                break
            total += ((frozen if end is None else min(frozen, end)) - start) // gap
        return total

    def _stretches(self) -> Iterator[tuple[int, int, int | None]]:
        """First and last synchronised step, after the freeze, between which gaps have one length; None: no last one."""
        start = 0
        while True:
            level = start // self.local_step_scaler
            gap = min(1 << min(level, self.local_step_clipper.bit_length()), self.local_step_clipper)
            if gap == self.local_step_clipper:
                yield start, gap, None
                return
            boundary = (level + 1) * self.local_step_scaler
            end = start + -(-(boundary - start) // gap) * gap
            yield start, gap, end
            start = end


def schedules(group: Mapping[str, Any]) -> tuple[VariancePolicy, SyncPolicy]:
    """Return both schedules of a parameter group with these options.

    Raises:
        InputError: one of them is no int of at least 1.
    """
    freeze = group["var_freeze_step"]
    return (
        VariancePolicy(var_freeze_step=freeze, var_update_scaler=group["var_update_scaler"]),
        SyncPolicy(
            var_freeze_step=freeze,
            local_step_scaler=group["local_step_scaler"],
            local_step_clipper=group["local_step_clipper"],
        ),
    )


def phase_after(step: int, group: Mapping[str, Any]) -> str:
    """What a group's step after the first `step` ones is: ``"variance"``, ``"sync"`` or ``"local"``."""
    return _phase_after(step, tuple(group[name] for name in _OPTIONS))


@lru_cache(maxsize=1024)  # a step asks several times
def _phase_after(step: int, options: tuple[Any, ...]) -> str:
    group = dict(zip(_OPTIONS, options, strict=True))
    variance, sync = schedules(group)
    if not group["compress"] or variance.updates(step + 1):
        return "variance"
    return "sync" if sync.synchronises(step + 1) else "local"
