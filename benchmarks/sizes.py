"""Sizes as one types them: 64M is 64 times 2**20 bytes; a sweep multiplies or adds from one to another."""

from __future__ import annotations

import argparse

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_size(text: str) -> int:
    """Bytes of ``"256M"``, ``"1g"``, ``"4096"``.

    Raises:
        argparse.ArgumentTypeError: it is not such a size.
    """
    upper = text.strip().upper().removesuffix("IB").removesuffix("B")
    digits = upper.rstrip("KMG")
    unit = upper[len(digits) :]
    if not digits.isdecimal() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or a number with K, M or G: 256M")
    return int(digits) * UNITS[unit]


def format_size(nbytes: int) -> str:
    """The shortest exact form of a size: 67108864 is ``64M``."""
    for unit in ("G", "M", "K"):
        if nbytes and nbytes % UNITS[unit] == 0:
            return f"{nbytes // UNITS[unit]}{unit}"
    return str(nbytes)


def sweep_sizes(first: int, last: int, factor: int) -> list[int]:
    """first, first·factor, ... up to last.

    Raises:
        ValueError: first is not positive, last is below first, or factor is below 2.
    """
    if first < 1 or last < first or factor < 2:
        raise ValueError(f"a sweep needs 1 <= -b <= -e and -f >= 2, got -b {first} -e {last} -f {factor}")
    sizes = []
    while first <= last:
        sizes.append(first)
        first *= factor
    return sizes


def up_to(largest: int) -> list[str]:
    """The driver's flags for three sizes, each 32 times the one before; the small ones show what compression costs."""
    return [f"-b{max(1, largest // 32**2)}", f"-e{largest}", "-f32"]
