"""Prepared launches hand the driver what the kernel is to get, in the right context; the driver here is a stand-in."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import pytest
import torch

from onebit.compress import OnebitError
from onebit.compress.gpu import driver
from onebit.compress.gpu.driver import Launch

CONTEXT, OTHER_CONTEXT, FUNCTION, STREAM = 0x7F0000001000, 0x7F0000002000, 0x7F0000003000, 0x7F0000004000
ARGUMENTS = (7, 2**62, -1, True)


class Driver:
    """Remembers launches as (function, grid, stream, arguments, context), and has a context per thread, 0 for none."""

    class CUDADriverError(RuntimeError):
        pass

    def __init__(self) -> None:
        self.launches: list[tuple[int, tuple[int, ...], int, list[int], int]] = []
        self.refuses = False
        self._thread = threading.local()

    def ctxGetCurrent(self) -> int:
        return getattr(self._thread, "context", 0)

    def ctxSetCurrent(self, context: int) -> None:
        self._thread.context = context

    def launchKernel(self, function: int, *rest: int) -> None:
        *grid, _, stream, pointers, extra = rest
        assert extra == 0
        places = [ctypes.c_void_p.from_address(pointers + 8 * i).value for i in range(len(ARGUMENTS))]
        values = [ctypes.c_longlong.from_address(place or 0).value for place in places]
        self.launches.append((function, tuple(grid), stream, values, self.ctxGetCurrent()))
        if self.refuses:
            raise self.CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stand_in = Driver()
    monkeypatch.setattr(driver, "driver", lambda: stand_in)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM + device, raising=False)
    return stand_in


def launch(device: int = 0) -> Callable[[], None]:
    return Launch(FUNCTION, CONTEXT, device, 3, 256, ARGUMENTS)


def test_every_argument_is_passed_as_64_bits(fake: Driver) -> None:
    fake.ctxSetCurrent(CONTEXT)
    start = launch(device=2)
    for _ in range(2):
        start()
    expected = (FUNCTION, (3, 1, 1, 256, 1, 1), STREAM + 2, [7, 2**62, -1, 1], CONTEXT)
    assert fake.launches == [expected] * 2


@pytest.mark.parametrize("current", [0, OTHER_CONTEXT], ids=["no context", "that of another device"])
def test_a_thread_with_another_context_launches_in_the_right_one_and_keeps_its_own(fake: Driver, current: int) -> None:
    start = launch()
    after: list[int] = []

    def run() -> None:
        fake.ctxSetCurrent(current)
        start()
        after.append(fake.ctxGetCurrent())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [made[-1] for made in fake.launches] == [CONTEXT]
    assert after == [current]


@pytest.mark.parametrize("current", [CONTEXT, OTHER_CONTEXT])
def test_a_refusal_is_an_error_with_the_drivers_name_for_it(fake: Driver, current: int) -> None:
    fake.ctxSetCurrent(current)
    fake.refuses = True
    with pytest.raises(OnebitError, match="starting a kernel failed with CUDA_ERROR_INVALID_VALUE"):
        launch()()
    assert fake.ctxGetCurrent() == current
