"""What processes of tests are told, so that their collectives travel in stripes."""

from __future__ import annotations

import os

from onebit.comm import peer_memory, striping


def all_striped(count: int) -> None:
    """Have NCCL carry collectives of any size in so many stripes; for processes of their own."""
    os.environ[peer_memory.SWITCH], os.environ[striping.SWITCH] = "0", str(count)
    striping.LEAST = 0
