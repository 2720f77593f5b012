"""The program that `first_call` starts: seconds of a fresh process's first and second call of each kernel, as JSON.

It imports nothing of the benchmarks, which would import the library before the clock starts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

NUMEL = 1 << 16


def _clock(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def time_calls() -> dict[str, float]:
    """``"import"``: of onebit.compress once torch is in; then first calls, and second calls as ``"encode again"``."""
    start = time.perf_counter()
    from onebit.compress import SignCodec

    times = {"import": time.perf_counter() - start}
    codec, x, residual = SignCodec(), torch.ones(NUMEL), torch.zeros(NUMEL)
    payload = torch.zeros(codec.plan([x])[0].payload_bytes, dtype=torch.uint8)
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(x, residual, out=payload),
        "reduce_encode": lambda: codec.reduce_encode(payload, residual, numel=NUMEL),
        "decode": lambda: codec.decode(payload, x),
    }
    for name, call in calls.items():
        times[name] = _clock(call)
        times[f"{name} again"] = _clock(call)
    return times


if __name__ == "__main__":
    sys.stdout.write(json.dumps(time_calls()))
