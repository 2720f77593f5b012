"""What tests of two levels have in common."""

from __future__ import annotations

from onebit.compress import SignCodec

SHARED = "shared memory"  # what carries numbers inside a node of processes
CODEC = SignCodec(block_size=64)
