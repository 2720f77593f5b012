"""The one table of operators and of the implementations that have them."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from onebit.compress.errors import InputError
from onebit.compress.layout import Layout

_log = logging.getLogger(__name__)

OPERATORS = ("encode", "reduce_encode", "decode", "pack_signs", "unpack_signs")
IMPLEMENTATIONS = {
    "reference": "onebit.compress.reference",
    "cpu": "onebit.compress.cpu.operators",
    "gpu": "onebit.compress.gpu.operators",
}
DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # the type of device an implementation needs; the reference runs on any
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(Protocol):
    """One implementation of every operator; `reference` says what each does. Arguments were checked by the caller."""

    name: str

    def encode(
        self,
        tensors: Sequence[Tensor],
        residual: Tensor | None,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        squared: bool,
    ) -> None:
        """Tensors to one payload per chunk."""

    def reduce_encode(
        self,
        payloads: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        chunk: int,
        squared: bool,
    ) -> None:
        """Every rank's payload of one chunk to the payload of their mean."""

    def undo_reduce(
        self,
        payloads: Tensor,
        residual: Tensor,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        chunk: int,
        keep: Tensor | None,
    ) -> None:
        """The residual as it was before reduce_encode, unless `keep`."""

    def all_finite(self, payloads: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
        """Whether all scales are finite, 0-dim bool on the device."""

    def decode(self, payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout) -> None:
        """One payload per chunk to tensors."""

    def pack_signs(self, x: Tensor, out: Tensor) -> None:
        """Values to bits."""

    def unpack_signs(self, bits: Tensor, out: Tensor) -> None:
        """Bits to ±1."""


def kernels_for(device: torch.device, name: str | None = None) -> Kernels:
    """Return the implementation called `name`, or the fastest there is for `device`.

    Raises:
        InputError: no implementation has that name, or it does not run on that device.
    """
    if name is None:
        name = _fastest(device.type)
    if name not in IMPLEMENTATIONS:
        raise InputError(f"no kernels are called {name!r}; there are {', '.join(map(repr, IMPLEMENTATIONS))}")
    if DEVICES.get(name, device.type) != device.type:
        raise InputError(
            f"the {name!r} kernels run on {DEVICES[name]} tensors, got one on {device}; leave kernels=None to have "
            "them chosen"
        )
    return _load(name)


@functools.cache
def _load(name: str) -> Kernels:
    return cast(Kernels, importlib.import_module(IMPLEMENTATIONS[name]))


@functools.cache
def _fastest(device_type: str) -> str:
    """The implementation for a type of device; what is slow for want of a package is said once."""
    if device_type == "cpu":
        return "cpu"
    try:
        if device_type == "cuda":
            importlib.import_module("cupy")
            return "gpu"
        why = "there are no faster ones"
    except ImportError as error:
        why = f"the CUDA kernels need CuPy, pip install 'onebit[cuda13]' or 'onebit[cuda12]' ({error})"
    _log.warning(
        "onebit uses its plain torch reference for %s tensors, which is right but many times slower than compiled "
        "kernels: %s. kernels_on(device) of a codec tells which are used",
        device_type,
        why,
    )
    return "reference"
