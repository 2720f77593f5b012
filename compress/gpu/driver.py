"""A prepared kernel launch: its arguments are laid out once, so that starting it is one call of the CUDA driver."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import c_int, c_longlong, c_uint, c_void_p
from typing import Any

import torch

from onebit.compress.errors import OnebitError

_SUCCESS = 0


class Launch:
    """One kernel with its arguments and its grid, to be started any number of times, by any thread.

    Args:
        function: the kernel's handle in the driver.
        context: handle of the device's context that it was loaded in.
        device: number of that device.
        blocks: of the grid.
        threads: per block.
        arguments: every one is passed as a 64-bit integer.
    """

    def __init__(
        self, function: int, context: int, device: int, blocks: int, threads: int, arguments: Sequence[int]
    ) -> None:
        self._driver = driver()
        self._context = context
        self._device = device
        self._values = (c_longlong * len(arguments))(*arguments)
        first = ctypes.addressof(self._values)
        self._pointers = (c_void_p * len(arguments))(*(first + 8 * i for i in range(len(arguments))))
        self._grid = (function, blocks, 1, 1, threads, 1, 1, 0)

    def __call__(self) -> None:
        """Start it on torch's current stream of its device, whatever the thread's current device is.

        Raises:
            OnebitError: the driver refused.
        """
        # A thread may have no context yet, or that of another device; torch.cuda.current_device() does not tell.
        if current_context() == self._context:
            self._start()
            return
        _check(self._driver.cuCtxPushCurrent_v2(self._context), "cuCtxPushCurrent")
        try:
            self._start()
        finally:
            _check(self._driver.cuCtxPopCurrent_v2(ctypes.byref(c_void_p())), "cuCtxPopCurrent")

    def _start(self) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._device)  # torch.cuda.current_stream() takes 2 µs longer
        _check(self._driver.cuLaunchKernel(*self._grid, stream, self._pointers, None), "cuLaunchKernel")


def current_context() -> int | None:
    """Handle of the calling thread's context; None if it has none."""
    context = c_void_p()
    _check(driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    return context.value


@functools.cache
def driver() -> Any:
    """The CUDA driver's own library, which is there wherever torch has found a device."""
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    grid = [c_uint] * 7
    signatures = {
        "cuLaunchKernel": [c_void_p, *grid, c_void_p, c_void_p, c_void_p],
        "cuCtxGetCurrent": [c_void_p],
        "cuCtxPushCurrent_v2": [c_void_p],
        "cuCtxPopCurrent_v2": [c_void_p],
        "cuGetErrorName": [c_int, c_void_p],
    }
    for name, types in signatures.items():
        getattr(library, name).argtypes = types
    return library


def _check(status: int, operation: str) -> None:
    if status == _SUCCESS:
        return
    name = ctypes.c_char_p()
    driver().cuGetErrorName(status, ctypes.byref(name))
    reason = (name.value or b"an unknown error").decode()
    raise OnebitError(
        f"{operation} failed with {reason} ({status}); an earlier kernel may be the cause, and "
        "CUDA_LAUNCH_BLOCKING=1 shows which"
    )
