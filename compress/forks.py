"""Keeps processes forked from one that uses CUDA, such as a DataLoader's workers, from freeing what that one dropped.

CUDA works in the process that has started it, and in none that is forked from it. One of those inherits what waits for
the garbage collector in its parent; where that is a stream, an event, or memory that a copy or another stream has used,
PyTorch ends the process that collects it ("DataLoader worker exited unexpectedly"). An optimizer and the schedule of
its learning rate hold each other, so any that are dropped wait in this way.
"""

from __future__ import annotations

import functools
import gc
import os


@functools.cache
def guard_forks() -> None:
    """From now on have forked processes leave to themselves what was there before; call it once CUDA is in use."""
    if hasattr(os, "register_at_fork"):  # not where processes cannot be forked
        os.register_at_fork(after_in_child=gc.freeze)
