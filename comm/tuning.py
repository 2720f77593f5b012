"""Measures whether averages are faster plain or compressed on these ranks, this network and this device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from onebit.comm.allreduce import CompressedAllreduce
from onebit.comm.auto import BucketMode
from onebit.comm.backend import Backend
from onebit.comm.clock import medians
from onebit.comm.numbers import gather_numbers
from onebit.comm.registry import make_backend
from onebit.compress.codec import Codec, as_codec

SIZES = tuple(1 << shift for shift in (10, 13, 16, 19, 22, 25))  # elements of float32, up to 128 MiB
LONG = 0.02  # seconds; a size that takes longer is the last one, beyond it lines are straight
KERNEL_NUMEL = 1 << 20  # elements on which kernels are timed alone
# A compressed average is not the exact mean, and times scatter; so compression must win by this factor.
MARGIN = 1.1


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What `tune` has measured; equal on all ranks, times being those of the slowest.

    Attributes:
        backend, ranks, device: where.
        latency: seconds of the smallest collective, an all_gather of 8 bytes.
        bandwidth: bytes per second that a rank sends in the largest plain average measured; 0 with one rank.
        kernel_rates: elements per second of ``"encode"``, ``"reduce_encode"`` and ``"decode"``, all ranks at once.
        numels: sizes of the averages that were timed, elements of float32, ascending; none with one rank.
        seconds: median time of each of them, by mode.
    """

    backend: str
    ranks: int
    device: str
    latency: float
    bandwidth: float
    kernel_rates: dict[str, float]
    numels: tuple[int, ...]
    seconds: dict[BucketMode, tuple[float, ...]]

    def predict(self, mode: BucketMode, numel: int) -> float:
        """Seconds of an average of `numel` elements: between measured sizes on straight lines, and beyond the last."""
        if not self.numels:
            return 0.0
        sizes, times = self.numels, self.seconds[mode]
        if numel <= sizes[-1] or len(sizes) == 1:
            return float(np.interp(numel, sizes, times))
        slope = max((times[-1] - times[-2]) / (sizes[-1] - sizes[-2]), 0.0)
        return times[-1] + slope * (numel - sizes[-1])

    def pick(self, numel: int) -> BucketMode:
        """How a bucket of `numel` elements should travel; ``"compressed"`` only where it wins by a tenth."""
        return "compressed" if MARGIN * self.predict("compressed", numel) < self.predict("plain", numel) else "plain"

    def __str__(self) -> str:
        """A few lines for people."""
        rates = ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in self.kernel_rates.items())
        lines = [
            f"{self.ranks} ranks, {self.backend}, {self.device}: latency {1e6 * self.latency:.0f} µs, "
            f"bandwidth {self.bandwidth / 1e9:.3f} GB/s; 1e9 elements/s: {rates}",
            *(
                f"{numel:>10,} elements: plain {1e3 * plain:.3f} ms, compressed {1e3 * compressed:.3f} ms: "
                f"{self.pick(numel)}"
                for numel, plain, compressed in zip(
                    self.numels, self.seconds["plain"], self.seconds["compressed"], strict=True
                )
            ),
        ]
        return "\n".join(lines)


def tune(
    backend: object = None,
    *,
    device: torch.device | str | None = None,
    codec: Codec | None = None,
) -> Tuning:
    """Measure this group of ranks, unless that has been done; collective, takes seconds.

    A result is kept with the process group, or with the Backend where there is none, for its device and codec. On one
    rank nothing is averaged and nothing measured.

    Args:
        backend: as for `make_backend`.
        device: of the tensors to average; None: cuda for a backend that carries nothing else, else cpu.
        codec: of the compressed average.

    Raises:
        BackendError: the backend is unknown or does not carry tensors of that device.
        MismatchError: ranks differ in the codec.
        TransportError: a rank did not take part within the timeout.
        InputError: the codec is none.
    """
    codec = as_codec(codec)
    group = make_backend(backend, device=device)
    where = torch.device(device or group.device_type or "cpu")
    known = _known.setdefault(_home(group), {})
    key = (where.type, codec)
    if key not in known:
        known[key] = _measure(group, where, codec)
    return known[key]


def is_tuned(backend: Backend, device: torch.device, codec: Codec) -> bool:
    """Whether `tune` would answer without measuring."""
    return (device.type, codec) in _known.get(_home(backend), {})


def _home(backend: Backend) -> Any:
    """What a result is kept with: backends of one process group are one network."""
    return getattr(backend, "group", backend)


_known: WeakKeyDictionary[Any, dict[tuple[str, Codec], Tuning]] = WeakKeyDictionary()


def _measure(backend: Backend, device: torch.device, codec: Codec) -> Tuning:
    numels: list[int] = []
    seconds: dict[BucketMode, list[float]] = {"plain": [], "compressed": []}
    for numel in SIZES if backend.size > 1 else ():
        plain, compressed = _averages(backend, device, numel, codec)
        numels.append(numel)
        seconds["plain"].append(plain)
        seconds["compressed"].append(compressed)
        if max(plain, compressed) > LONG:
            break
    return Tuning(
        backend=backend.name,
        ranks=backend.size,
        device=str(device),
        latency=_latency(backend, device),
        bandwidth=8 * (backend.size - 1) / backend.size * numels[-1] / seconds["plain"][-1] if numels else 0.0,
        kernel_rates=_kernel_rates(backend, device, codec),
        numels=tuple(numels),
        seconds={mode: tuple(times) for mode, times in seconds.items()},
    )


def _averages(backend: Backend, device: torch.device, numel: int, codec: Codec) -> list[float]:
    """Seconds of a plain and of a compressed average of one tensor."""
    tensor = _normal(numel, device)
    averages = [CompressedAllreduce(tensor, backend, codec, mode=mode) for mode in ("plain", "compressed")]
    return medians(backend, device, [partial(average, tensor) for average in averages])


def _latency(backend: Backend, device: torch.device) -> float:
    [seconds] = medians(backend, device, [lambda: gather_numbers(backend, [0.0])])
    return seconds


def _kernel_rates(backend: Backend, device: torch.device, codec: Codec) -> dict[str, float]:
    """Elements per second of each of the codec's operators."""
    x = _normal(KERNEL_NUMEL, device)
    residual = torch.zeros(KERNEL_NUMEL, device=device) if codec.error_feedback else None
    payload = codec.encode(x, residual)
    payloads = payload.expand(backend.size, -1).contiguous()
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(x, residual, out=payload),
        "reduce_encode": lambda: codec.reduce_encode(payloads, residual, numel=KERNEL_NUMEL, out=payload),
        "decode": lambda: codec.decode(payload, x),
    }
    seconds = medians(backend, device, [*calls.values()])
    return {name: KERNEL_NUMEL / each for name, each in zip(calls, seconds, strict=True)}


def _normal(numel: int, device: torch.device) -> Tensor:
    """A tensor like a gradient, drawn without touching the program's random state."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(device)
