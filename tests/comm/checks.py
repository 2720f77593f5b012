"""Checks that ranks make one after the other in one launch, so that one run tells of all that failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from onebit.comm import Backend

Check = Callable[[Backend], None]
Failures = dict[str, str]
"""The traceback of each check that failed on a rank, by its name."""


def failures_of(backend: Backend, checks: Sequence[Check]) -> Failures:
    """Make all checks on this rank."""
    failures = {}
    for check in checks:
        try:
            check(backend)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # what has failed on the device is this check's
        except Exception:
            failures[check.__name__] = traceback.format_exc()
    return failures


def assert_passed(failures: Sequence[Failures], name: str) -> None:
    """Fail with what the ranks, in order, say of one check."""
    failed = [f"rank {rank}: {found[name]}" for rank, found in enumerate(failures) if name in found]
    assert not failed, "\n".join(failed)


def short(value: Any) -> str:
    """What a check, or another parameter, is called where tests are listed."""
    return getattr(value, "__name__", str(value)).removeprefix("check_")
