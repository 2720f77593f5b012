"""Prepared launches hand the driver what the kernel is to get, in the right context; the driver here is a stand-in."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onebit.compress import OnebitError
from onebit.compress.gpu import driver
from onebit.compress.gpu.driver import Launch

CONTEXT, OTHER_CONTEXT, FUNCTION, STREAM = 0x7F0000001000, 0x7F0000002000, 0x7F0000003000, 0x7F0000004000
BAD_VALUE = 1


class Driver:
    """Remembers launches as (function, grid, stream, arguments, context), and has a stack of contexts per thread."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, tuple[int, ...], int, list[int], int | None]] = []
        self.status = 0
        self._thread = threading.local()

    @property
    def contexts(self) -> list[int]:
        if not hasattr(self._thread, "contexts"):
            self._thread.contexts = []
        found: list[int] = self._thread.contexts
        return found

    def cuCtxGetCurrent(self, out: Any) -> int:
        ctypes.cast(out, ctypes.POINTER(ctypes.c_void_p))[0] = self.contexts[-1] if self.contexts else None
        return 0

    def cuCtxPushCurrent_v2(self, context: int) -> int:
        self.contexts.append(context)
        return 0

    def cuCtxPopCurrent_v2(self, out: Any) -> int:
        self.contexts.pop()
        return 0

    def cuLaunchKernel(self, function: int, *rest: Any) -> int:
        *grid, _, stream, pointers, extra = rest
        assert extra is None
        values = [ctypes.c_longlong.from_address(p).value for p in pointers]
        self.launches.append((function, tuple(grid), stream, values, self.contexts[-1] if self.contexts else None))
        return self.status

    def cuGetErrorName(self, status: int, out: Any) -> int:
        ctypes.cast(out, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_INVALID_VALUE"
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stand_in = Driver()
    monkeypatch.setattr(driver, "driver", lambda: stand_in)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM + device, raising=False)
    return stand_in


def launch(device: int = 0) -> Callable[[], None]:
    return Launch(FUNCTION, CONTEXT, device, 3, 256, (7, 2**62, -1, True))


def test_every_argument_is_passed_as_64_bits(fake: Driver) -> None:
    fake.contexts.append(CONTEXT)
    start = launch(device=2)
    for _ in range(2):
        start()
    expected = (FUNCTION, (3, 1, 1, 256, 1, 1), STREAM + 2, [7, 2**62, -1, 1], CONTEXT)
    assert fake.launches == [expected] * 2


@pytest.mark.parametrize("current", [None, OTHER_CONTEXT], ids=["no context", "that of another device"])
def test_a_thread_with_another_context_launches_in_the_right_one_and_keeps_its_own(
    fake: Driver, current: int | None
) -> None:
    start = launch()
    before: list[int] = [] if current is None else [current]

    def run() -> None:
        fake.contexts.extend(before)
        start()
        after.extend(fake.contexts)

    after: list[int] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [made[-1] for made in fake.launches] == [CONTEXT]
    assert after == before


@pytest.mark.parametrize("current", [CONTEXT, OTHER_CONTEXT])
def test_a_refusal_is_an_error_with_the_drivers_name_for_it(fake: Driver, current: int) -> None:
    fake.contexts.append(current)
    fake.status = BAD_VALUE
    with pytest.raises(OnebitError, match=r"cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE \(1\)"):
        launch()()
    assert fake.contexts == [current]
