"""The options that torch tests its own Adam with."""

from __future__ import annotations

import sys
import unittest
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch


def torch_inputs() -> list[Any]:
    """Each has `kwargs` and a description `desc`; for all kinds of devices, those of AdamW being those of Adam."""
    missing = find_spec("expecttest") is None
    if missing:  # torch's tables import it for a test class that is not used here
        stand_in = ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    try:
        from torch.testing._internal.common_optimizers import optim_inputs_func_adam
    finally:
        if missing:
            del sys.modules["expecttest"]
    found = {x.desc: x for device in ("cpu", "mps", "cuda") for x in optim_inputs_func_adam(device, torch.float32)}
    return list(found.values())
