"""The tables of operators and of the implementations that have them: for signs, and for small numbers."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from onebit.compress.errors import InputError
from onebit.compress.forks import guard_forks
from onebit.compress.operators import Functions
from onebit.compress.quantizer import Quantizer

_log = logging.getLogger(__name__)

OPERATORS = ("encode", "reduce_encode", "decode", "pack_signs", "unpack_signs")
IMPLEMENTATIONS = {
    "reference": "onebit.compress.reference",
    "cpu": "onebit.compress.cpu.operators",
    "gpu": "onebit.compress.gpu.operators",
}
QUANTIZED = {
    "reference": "onebit.compress.quantized_reference",
    "cpu": "onebit.compress.cpu.quantized",
    "gpu": "onebit.compress.gpu.quantized",
}
DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # the type of device an implementation needs; the reference runs on any
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(Functions[bool], Protocol):
    """One implementation of every operator of `SignCodec`; `reference` says what each does.

    They are told whether a scale is the root of the mean square; to decode, and to undo, it makes no difference.
    """

    name: str

    def pack_signs(self, x: Tensor, out: Tensor) -> None:
        """Values to bits."""

    def unpack_signs(self, bits: Tensor, out: Tensor) -> None:
        """Bits to ±1."""


class QuantizedKernels(Functions[Quantizer], Protocol):
    """One implementation of every operator of the quantizing codecs; `quantized_reference` says what each does."""

    name: str


def kernels_for(device: torch.device, name: str | None = None) -> Kernels:
    """Return the implementation of the sign operators called `name`, or the fastest there is for `device`.

    Raises:
        InputError: no implementation has that name, or it does not run on that device.
    """
    return cast(Kernels, _load(_chosen(device, name, IMPLEMENTATIONS)))


def quantized_kernels_for(device: torch.device, name: str | None = None) -> QuantizedKernels:
    """As `kernels_for`, of the operators of the quantizing codecs."""
    return cast(QuantizedKernels, _load(_chosen(device, name, QUANTIZED)))


def _chosen(device: torch.device, name: str | None, table: Mapping[str, str]) -> str:
    """The module of the implementation."""
    if device.type == "cuda":
        guard_forks()
    if name is None:
        name = _fastest(device.type)
    if name not in table:
        raise InputError(f"no kernels are called {name!r}; there are {', '.join(map(repr, table))}")
    if DEVICES.get(name, device.type) != device.type:
        raise InputError(
            f"the {name!r} kernels run on {DEVICES[name]} tensors, got one on {device}; leave kernels=None to have "
            "them chosen"
        )
    return table[name]


@functools.cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


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
