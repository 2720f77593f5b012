"""What is left to the garbage collector, where it should have been freed when it was dropped."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def tensors_left_to_the_collector() -> Iterator[list[str]]:
    """Give a list that names, after the `with` block, the tensors that the block dropped and that were not freed."""
    left: list[str] = []
    gc.collect()
    gc.disable()
    older = _tensors(gc.get_objects())  # held, so that what other tests have left is not taken for garbage of the block
    try:
        yield left
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left += [f"{t.dtype} {tuple(t.shape)}" for t in _tensors(gc.garbage)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        older.clear()
        gc.enable()


def _tensors(objects: list[Any]) -> list[Tensor]:
    return [found for found in objects if issubclass(type(found), Tensor)]  # not isinstance, which asks proxies
