"""The oracle of the quantizing codecs, which the driver of the benchmarks counts wrong elements by, too."""

from __future__ import annotations

from onebit.benchmarks.quantized_oracle import (
    BITS,
    E4M3,
    Bools,
    Bytes,
    Encoded,
    Floats,
    Spec,
    decode,
    e4m3,
    encode,
    mean,
    payloads,
    taken_apart,
    transformed,
    values,
)

__all__ = [
    "BITS",
    "E4M3",
    "Bools",
    "Bytes",
    "Encoded",
    "Floats",
    "Spec",
    "decode",
    "e4m3",
    "encode",
    "mean",
    "payloads",
    "taken_apart",
    "transformed",
    "values",
]
