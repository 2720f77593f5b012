"""The options that torch tests its own Adam with, from a module that wants a package for tests of another kind."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import TestCase


def adam_inputs(device: str) -> list[Any]:
    """Torch's table for Adam, which is that for AdamW too: objects with `kwargs` and `desc`."""
    if "expecttest" not in sys.modules:
        try:
            importlib.import_module("expecttest")
        except ImportError:
            sys.modules["expecttest"] = stand_in = ModuleType("expecttest")
            stand_in.TestCase = TestCase  # type: ignore[attr-defined]
            stand_in.ACCEPT = False  # type: ignore[attr-defined]
    inputs: list[Any] = importlib.import_module("torch.testing._internal.common_optimizers").optim_inputs_func_adam(
        device
    )
    return inputs
