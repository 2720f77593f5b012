"""Codecs' CUDA kernels alone, beside a copy; bits are compared with those of the CPU's kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from onebit.benchmarks.gpu_timing import against, differing, make_row, timed
from onebit.benchmarks.row import Row
from onebit.compress import Codec

DTYPES = (torch.float32, torch.bfloat16)
MEANS_OF = (2, 4, 8)


def kernels(numel: int, device: torch.device, rounds: int, codecs: Mapping[str, Codec]) -> list[Row]:
    """Copy, and the codecs' kernels in fp32 and bf16, of normal numbers; `codecs` by what names of rows say of them."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    return [row for dtype in DTYPES for row in _kernels_of(x.to(dtype), device, rounds, codecs)]


def _kernels_of(x_cpu: Tensor, device: torch.device, rounds: int, codecs: Mapping[str, Codec]) -> list[Row]:
    numel, dtype = x_cpu.numel(), x_cpu.dtype
    x, y = x_cpu.to(device), torch.empty_like(x_cpu, device=device)
    copied = 2 * numel * dtype.itemsize
    yardstick = make_row("copy", dtype, numel, copied, timed(lambda: y.copy_(x), rounds), int((x != y).sum()))
    rows = [yardstick]
    for name, codec in codecs.items():
        rows += _encode_and_decode(name, codec, x_cpu, x, y, rounds)
        if dtype == torch.float32:
            rows += [_reduce_encode(name, codec, x_cpu, n, device, rounds) for n in MEANS_OF]
    for row in rows:
        row.ratios.update(against("copy", row, yardstick))
    return rows


def _encode_and_decode(name: str, codec: Codec, x_cpu: Tensor, x: Tensor, y: Tensor, rounds: int) -> list[Row]:
    """Of the same tensor on the CPU and on the device; `y` is written to."""
    numel, dtype = x.numel(), x.dtype
    (layout,) = codec.plan([numel])
    residual, residual_cpu = _residual(codec, numel, x.device), _residual(codec, numel, x_cpu.device)
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=x.device)
    wrong = 0
    for _ in range(2):  # the second time the residual is not zero
        codec.encode(x, residual, layout=layout, out=payload)
        payload_cpu = codec.encode(x_cpu, residual_cpu)
        wrong += differing(payload, payload_cpu) + _differing_residuals(residual, residual_cpu)
    times = timed(lambda: codec.encode(x, residual, layout=layout, out=payload), rounds)
    moved = numel * (dtype.itemsize + 8 * codec.error_feedback) + layout.payload_bytes
    encoded = make_row(f"encode{name}", dtype, numel, moved, times, wrong)

    codec.decode(payload, y, layout=layout)
    expected = torch.empty_like(x_cpu)
    codec.decode(payload.cpu(), expected)
    wrong = differing(y, expected)
    times = timed(lambda: codec.decode(payload, y, layout=layout), rounds)
    moved = numel * dtype.itemsize + layout.payload_bytes
    return [encoded, make_row(f"decode{name}", dtype, numel, moved, times, wrong)]


def _reduce_encode(name: str, codec: Codec, x: Tensor, ranks: int, device: torch.device, rounds: int) -> Row:
    """The mean of what `ranks` equal parts of `x`, on the CPU, are encoded to."""
    numel = x.numel() // ranks
    payloads_cpu = torch.stack([codec.encode(part) for part in x[: ranks * numel].view(ranks, -1)])
    payloads, (layout,) = payloads_cpu.to(device), codec.plan([numel])
    residual, residual_cpu = _residual(codec, numel, device), _residual(codec, numel, payloads_cpu.device)
    out = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=device)

    def run() -> None:
        codec.reduce_encode(payloads, residual, layout=layout, out=out)

    run()
    wrong = differing(out, codec.reduce_encode(payloads_cpu, residual_cpu, numel=numel))
    wrong += _differing_residuals(residual, residual_cpu)
    moved = 8 * numel * codec.error_feedback + (ranks + 1) * layout.payload_bytes
    return make_row(f"reduce_encode{name} of {ranks}", x.dtype, numel, moved, timed(run, rounds), wrong)


def _residual(codec: Codec, numel: int, device: torch.device) -> Tensor | None:
    return torch.zeros(numel, device=device) if codec.error_feedback else None


def _differing_residuals(a: Tensor | None, b: Tensor | None) -> int:
    return 0 if a is None or b is None else differing(a, b)
