"""A prepared kernel launch: its arguments are laid out once, so that starting it is one call of the CUDA driver."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_longlong, c_void_p
from typing import Any

import torch

from onebit.compress.errors import OnebitError


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
        self._arguments = ctypes.addressof(self._pointers)
        self._grid = (function, blocks, 1, 1, threads, 1, 1, 0)

    def __call__(self, stream: int | None = None) -> None:
        """Start it, whatever the thread's current device is.

        Args:
            stream: handle of a stream of its device; None: torch's current one.

        Raises:
            OnebitError: the driver refused.
        """
        # A thread may have no context yet, or that of another device; torch.cuda.current_device() does not tell.
        current = self._driver.ctxGetCurrent()
        if current == self._context:
            self._start(stream)
            return
        self._driver.ctxSetCurrent(self._context)
        try:
            self._start(stream)
        finally:
            self._driver.ctxSetCurrent(current)

    def _start(self, stream: int | None) -> None:
        if stream is None:
            stream = torch._C._cuda_getCurrentRawStream(self._device)  # torch.cuda.current_stream() takes 2 µs longer
        try:
            self._driver.launchKernel(*self._grid, stream, self._arguments, 0)
        except self._driver.CUDADriverError as error:
            raise OnebitError(
                f"starting a kernel failed with {error}; an earlier kernel may be the cause, and "
                "CUDA_LAUNCH_BLOCKING=1 shows which"
            ) from error


def current_context() -> int:
    """Handle of the calling thread's context; 0 if it has none."""
    context: int = driver().ctxGetCurrent()
    return context


@functools.cache
def driver() -> Any:
    """CuPy's bindings of the CUDA driver, compiled: a call by ctypes would take the host some 3 µs longer."""
    from cupy.cuda import driver as bindings

    return bindings
