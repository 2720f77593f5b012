"""Functions that torch.compile calls as they are: they talk to other ranks, and to a device behind torch's back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def untraced(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Decorate what a compiled caller breaks its graph for; with ``fullgraph=True`` torch raises there.

    The compiler is imported by the first call and not by the decoration, for that takes longer than all of `onebit`.
    """
    kept: list[Callable[Given, Result]] = []

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if not kept:
            kept.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return kept[0](*args, **kwargs)

    return call
