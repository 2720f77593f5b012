"""A local step of 0/1 Adam in one pass over memory: what its kernels are told, and which kernels there are."""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from onebit.compress import Codec
from onebit.compress.layout import Layout

IMPLEMENTATIONS = {"cpu": "onebit.optim.cpu.local", "gpu": "onebit.optim.gpu.local"}  # named as the codec's


@dataclass(frozen=True, kw_only=True)
class LocalStep(ABC):
    """One local step of a list of tensors, all row-major and on one device.

    With m' = β₁·m + α·g, 0 where v is 0, and a' = a + share·(m' - a), a parameter becomes
    x = kept·y - rate·a' / (√v·root + ε), rounded; every operation in fp32 is rounded once, in the order written, so
    that implementations agree bit for bit.

    Attributes:
        name: of the implementation.
        layout: of the tensors, in blocks of 1024 and one chunk; tables are kept with it.
        grads: g, fp32, bf16 or fp16; None counts as zeros.
        params: x, fp32, bf16 or fp16, overwritten.
        momenta, means: m and a, fp32, updated in place.
        starts, variances: y and v, fp32.
        rows: (k, 4) fp32 on the device: share, rate, kept and root of each tensor.
        finite: 0-dim bool on the device.
        beta1, alpha, eps: β₁, ±(1-β₁) and ε.
        begins: None in the middle of an interval. Else it begins here: a is 0 whatever `means` hold, and where an entry
            is true y is what x is now, and is written to `starts`.
    """

    name: ClassVar[str]

    layout: Layout
    grads: Sequence[Tensor | None]
    params: Sequence[Tensor]
    momenta: Sequence[Tensor]
    means: Sequence[Tensor]
    starts: Sequence[Tensor]
    variances: Sequence[Tensor]
    rows: Tensor
    finite: Tensor
    beta1: float
    alpha: float
    eps: float
    begins: Sequence[bool] | None = None

    @abstractmethod
    def make(self) -> None:
        """Make the step, and set `finite`: whether all m' are.

        Where a gradient makes one that is not, nothing is left of the step but its decay: no m changes, a becomes
        a·(1 - share), and x follows. An implementation may take it back when it has made it, to within rounding.
        """


def local_kernel(device: torch.device, group: Mapping[str, Any], codec: Codec) -> type[LocalStep] | None:
    """Return what makes local steps of a group on `device` beside the codec's kernels; None: there is nothing."""
    coupled = not group["adamw_mode"] and group["weight_decay"]
    name = codec.kernels_on(device)
    return None if coupled or name not in IMPLEMENTATIONS else _load(name)


@functools.cache
def _load(name: str) -> type[LocalStep]:
    return cast(type[LocalStep], importlib.import_module(IMPLEMENTATIONS[name]).LocalStep)
