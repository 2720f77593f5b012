"""`python -m onebit.benchmarks.gpu_adam`: FusedAdam on a GPU beside torch's fused and foreach AdamW.

Updated parameters are compared with torch's before a time is taken. Bandwidth counts what a step has to read and write.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from onebit.benchmarks import console
from onebit.benchmarks.gpu_run import flags_of, report, status
from onebit.benchmarks.gpu_steps import bert_large
from onebit.benchmarks.gpu_timing import MI, against, captured, make_row, timed
from onebit.benchmarks.row import Row
from onebit.optim import FusedAdam
from onebit.optim.gpu import adam
from onebit.optim.gpu.adam_step import Kind, Shapes, Step

MANY = [(1000,)] * 10_000
LR = 1e-3
CHECKED_STEPS = 3
HOST_CALLS = 15
BARS = {"": 0.85, " BERT-Large": 0.78, " 10,000 × 1,000": 0.2}  # of the time of torch's fused AdamW
COPY_BAR = 0.93  # of the bandwidth of a copy
# Vectors of four elements per thread, and thread blocks that a multiprocessor holds at least.
VARIANTS = [(1, 5), (1, 6), (1, 8), (2, 4), (2, 5), (4, 3)]
KERNELS = "ADAM(f32_f32, f32, f32, false)\nADAM(bf16_bf16, bf16, bf16, false)\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: everything was right; 1: something was wrong."""
    options = flags_of("gpu_adam", __doc__).parse_args(arguments)
    large = [(options.mega * MI,)]
    figures: dict[str, object] = {"adam_kernels": _first_step()}
    rows = [copy_row(options.mega * MI, options.iters)]
    host: dict[str, float] = {}
    for suffix, shapes in (("", large), (" BERT-Large", bert_large()), (" 10,000 × 1,000", MANY)):
        rows += optimizers(suffix, shapes, options.iters, host)
    for dtype in (torch.float32, torch.bfloat16):
        rows += reduced(options.mega * MI, dtype, options.iters)
    for dtype in (torch.float32, torch.bfloat16):
        rows += variants(options.mega * MI, dtype, options.iters)
    for row in rows[1:]:
        row.ratios.update(against("copy", row, rows[0]))
    figures |= {"host_us": host, "bars": bars(rows)}
    report("adam", 1, options.iters, rows, options.output, **figures)
    for name, microseconds in host.items():
        console.say(f"host, {name}: {microseconds:.0f} µs a step")
    for line in (figures["adam_kernels"], *bars(rows)):
        console.say(str(line))
    sys.stdout.flush()
    return status(rows)


def _first_step() -> str:
    p = torch.zeros(10, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = FusedAdam([p])
    start = time.perf_counter()
    optimizer.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return (
        f"kernels: {optimizer.kernels}; the first step of this process took {seconds:.2f} s, compiling or loading them"
    )


def copy_row(numel: int, rounds: int) -> Row:
    """What the memory can do."""
    x, y = torch.randn(numel, device="cuda"), torch.empty(numel, device="cuda")
    return make_row("copy", x.dtype, numel, 8 * numel, timed(lambda: y.copy_(x), rounds), int((x != y).sum()))


def optimizers(suffix: str, shapes: Sequence[tuple[int, ...]], rounds: int, host: dict[str, float]) -> list[Row]:
    """Ours and torch's two on fp32 parameters of these shapes, and ours as a captured graph; `host` gets µs per step.

    Several steps are timed one after the other, so that the device hides the host's time if its own is longer; alone, a
    step starts on an idle device.
    """
    params = _parameters(shapes)
    numel = sum(p.numel() for p in params)
    wrong = _wrong(params)
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "FusedAdam": lambda: FusedAdam(params, LR),
        "AdamW(fused=True)": lambda: torch.optim.AdamW(params, LR, fused=True),
        "AdamW(foreach=True)": lambda: torch.optim.AdamW(params, LR, foreach=True),
    }
    rows: list[Row] = []
    alone: list[Row] = []
    for name, make in makers.items():
        optimizer = make()
        times = timed(optimizer.step, rounds)
        rows.append(make_row(f"{name}{suffix}", torch.float32, numel, 28 * numel, times, None if rows else wrong))
        times = timed(optimizer.step, rounds, launches=1)
        alone.append(make_row(f"{name}, alone{suffix}", torch.float32, numel, 28 * numel, times, None))
        host[f"{name}{suffix}"] = _host_microseconds(optimizer.step)
        del optimizer
    graphed = FusedAdam(params, LR, capturable=True)
    times = timed(captured(graphed.step).replay, rounds)
    rows.append(make_row(f"FusedAdam replayed{suffix}", torch.float32, numel, 28 * numel, times, None))
    for row in rows:
        row.ratios.update(against("fused", row, rows[1], by_time=True))
    for row in alone:
        row.ratios.update(against("fused", row, alone[1], by_time=True))
    return rows + alone


def reduced(numel: int, gradient: torch.dtype, rounds: int) -> list[Row]:
    """Bf16 parameters without and with fp32 copies; their gradients are bf16 or, as a parameter's may be, fp32."""
    p = torch.randn(numel, device="cuda").bfloat16().requires_grad_()
    if gradient != p.dtype:
        if not hasattr(p, "grad_dtype"):
            return []
        p.grad_dtype = gradient
    p.grad = torch.randn(numel, device="cuda").to(gradient)
    rows = []
    for master in (False, True):
        optimizer = FusedAdam([p], LR, master_weights=master)
        moved = 16 + gradient.itemsize + (2 + 8 if master else 4)
        case = f"FusedAdam, {str(gradient).removeprefix('torch.')} gradient{', master' * master}"
        rows.append(make_row(case, p.dtype, numel, moved * numel, timed(optimizer.step, rounds), None))
        del optimizer
    return rows


def variants(numel: int, dtype: torch.dtype, rounds: int) -> list[Row]:
    """Other numbers of elements per thread and of thread blocks per multiprocessor, on one tensor and its gradient."""
    p, g = (torch.zeros(numel, dtype=dtype, device="cuda") for _ in range(2))
    m, v = (torch.zeros(numel, device="cuda") for _ in range(2))
    g.normal_()
    steps = torch.zeros(1, device="cuda")
    shapes = Shapes((numel,), (Kind(p.dtype, g.dtype, False),), (0,))
    options = FusedAdam([torch.nn.Parameter(p)], LR).param_groups
    states = [{"exp_avg": m, "exp_avg_sq": v}]
    addresses = [p.data_ptr(), m.data_ptr(), v.data_ptr(), 0]
    step = Step([p], [g], states, addresses, [g.data_ptr()], options, None, None)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for vectors, resident in VARIANTS:
            source = Path(folder) / f"adam_{vectors}_{resident}.cu"
            source.write_text(_variant(vectors, resident))
            launches = adam.AdamLaunches(shapes, steps, source, vectors)
            times = timed(lambda launches=launches: launches(step), rounds)  # type: ignore[misc]
            case = f"variant: {vectors} vectors, ≥ {resident} blocks"
            rows.append(make_row(case, dtype, numel, (16 + 3 * dtype.itemsize) * numel, times, None))
    return rows


def _variant(vectors: int, resident: int) -> str:
    """The source with the kernels that are compared."""
    head, _ = adam.SOURCE.read_text().split("#define GRADIENTS")
    return f"#define VECTORS {vectors}\n#define RESIDENT {resident}\n{head}\n{KERNELS}"


def bars(rows: Sequence[Row]) -> list[str]:
    """What was to be reached, and what was."""
    found = {row.case: row for row in rows}
    lines = []
    for suffix, bar in BARS.items():
        ratios = [
            found[f"FusedAdam{how}{suffix}"].time.median / found[f"AdamW(fused=True){how}{suffix}"].time.median
            for how in ("", ", alone")
        ]
        times = f"{ratios[0]:.3f} of the time of torch's fused AdamW, {ratios[1]:.3f} where a step is alone"
        lines.append(f"FusedAdam{suffix}: {times}; the bar is {bar}")
    fraction = found["FusedAdam"].algbw / found["copy"].algbw
    return [*lines, f"FusedAdam: {fraction:.3f} of the bandwidth of a copy; the bar is {COPY_BAR}"]


def _parameters(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    params = [torch.randn(s, device="cuda", generator=generator).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device="cuda", generator=generator)
    return params


def _wrong(params: Sequence[Tensor]) -> int:
    """Elements that a few steps of ours and of torch's leave further apart than fp32 rounding explains."""
    ends = []
    for make in (FusedAdam, torch.optim.AdamW):
        copies = [p.detach().clone().requires_grad_() for p in params]
        for p, copy in zip(params, copies, strict=True):
            copy.grad = p.grad
        optimizer = make(copies, LR)
        for _ in range(CHECKED_STEPS):
            optimizer.step()
        ends.append(copies)
    # Each element is near its own value and near what was added to it, whichever is larger, to ten units of 2^-24.
    bound = 10 * 2.0**-24
    return sum(int(((a - b).abs() > bound * (b.abs() + CHECKED_STEPS * LR)).sum()) for a, b in zip(*ends, strict=True))


def _host_microseconds(step: Callable[[], object]) -> float:
    """Median time until a step returns, the device being idle when it starts."""
    times = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
