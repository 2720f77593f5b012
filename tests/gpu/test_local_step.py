"""The kernels of 0/1 Adam's local steps against separate fp32 operations, bit for bit, and taken back to rounding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from onebit.compress import SignCodec
from onebit.optim.gpu.local import LocalStep

DEVICE = "cuda"
SIZES = [3000, 1, 1024, 40]
DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp16": [torch.float16],
    "mixed": [torch.float16, torch.float32, torch.bfloat16],
}
BETA1, ALPHA, EPS = 0.9, 0.1, 1e-8


@dataclass
class Lists:
    """What a step reads and writes, a tensor per parameter, on the CPU."""

    grads: list[Tensor | None]
    params: list[Tensor]
    momenta: list[Tensor]
    means: list[Tensor]
    starts: list[Tensor]
    variances: list[Tensor]


def lists(dtypes: Sequence[torch.dtype], grad_dtypes: Sequence[torch.dtype]) -> Lists:
    def normal(dtypes: Sequence[torch.dtype] = (torch.float32,)) -> list[Tensor]:
        return [torch.randn(n).to(dtypes[i % len(dtypes)]) for i, n in enumerate(SIZES)]

    variances = [torch.rand(n) * 10.0**-i for i, n in enumerate(SIZES)]
    variances[0][100:300], variances[0][1700] = 0.0, 1e-40  # dead ones, and one whose root needs care
    made = Lists([*normal(grad_dtypes)], normal(dtypes), normal(), normal(), normal(), variances)
    for m, a, v in zip(made.momenta, made.means, variances, strict=True):
        m[v == 0], a[v == 0] = 0.0, 0.0
    return made


def on_device(tensors: Sequence[Tensor | None], unaligned: bool) -> list[Tensor]:
    """Copies; unaligned: starting one element after an aligned address."""
    copies: list[Tensor | None] = []
    for t in tensors:
        if t is None:
            copies.append(None)
            continue
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)
        copies.append(memory[unaligned : t.numel() + unaligned].copy_(t))
    return copies  # type: ignore[return-value]


def step_of(given: Lists, rows: Tensor, unaligned: bool = False) -> LocalStep:
    (layout,) = SignCodec().plan(SIZES)
    copies = {name: on_device(tensors, unaligned) for name, tensors in vars(given).items()}
    finite = torch.zeros((), dtype=torch.bool, device=DEVICE)
    return LocalStep(
        layout=layout,
        **copies,
        rows=rows.to(DEVICE),
        finite=finite,
        beta1=BETA1,
        alpha=ALPHA,
        eps=EPS,  # type: ignore[arg-type]
    )


def rows_of(share: float) -> Tensor:
    return torch.tensor([[share, 1e-2 * (i + 1), 1 - 1e-3 * i, 1.25 + i] for i in range(len(SIZES))])


def moved(given: Lists, rows: Tensor, means: Sequence[Tensor]) -> list[Tensor]:
    """Where parameters go; an fp32 root or quotient rounded from fp64 is that of IEEE."""
    result = []
    for p, y, a, v, (_, rate, kept, root) in zip(given.params, given.starts, means, given.variances, rows, strict=True):
        d = v.double().sqrt().float() * root + EPS
        step = torch.where(v == 0, 0.0, ((rate * a).double() / d.double()).float())
        result.append((kept * y - step).to(p.dtype))
    return result


def differing(mine: Sequence[Tensor], expected: Sequence[Tensor]) -> list[int]:
    return [int((a.cpu() != b).sum()) for a, b in zip(mine, expected, strict=True)]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_a_step_is_that_of_separate_operations(dtypes: Sequence[torch.dtype]) -> None:
    torch.manual_seed(0)
    for share, unaligned, wide, absent in itertools.product((1.0, 0.25), *[(False, True)] * 3):
        given = lists(dtypes, [torch.float32] if wide else dtypes)
        if absent:
            given.grads[2] = None
        rows = rows_of(share)
        momenta, means = [], []
        for g, m, a, v in zip(given.grads, given.momenta, given.means, given.variances, strict=True):
            wanted = torch.zeros_like(m) if g is None else g.float()
            momenta.append(torch.where(v == 0, 0.0, m * BETA1 + wanted * ALPHA))
            means.append(a + share * (momenta[-1] - a))
        step = step_of(given, rows, unaligned)
        step.make()
        told = f"share {share}, unaligned {unaligned}, fp32 gradients {wide}, a gradient absent {absent}"
        assert bool(step.finite), told
        assert not any(differing(step.momenta, momenta)), told
        assert not any(differing(step.means, means)), told
        assert not any(differing(step.params, moved(given, rows, means))), told


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_step_with_a_number_that_is_not_finite_adds_nothing(bad: float, share: float) -> None:
    torch.manual_seed(1)
    for index, element in ((0, 5), (0, 2500), (3, 39)):
        given = lists(DTYPES["mixed"], DTYPES["mixed"])
        grad = given.grads[index]
        assert grad is not None
        grad[element] = bad
        if share == 1.0:
            given.means = [torch.zeros_like(a) for a in given.means]
        rows = rows_of(share)
        step = step_of(given, rows)
        step.make()
        assert not bool(step.finite)
        for mine, before in zip(step.momenta, given.momenta, strict=True):
            # m is below 8: it is multiplied, added to, taken from and divided, with an error of 2^-24 each.
            torch.testing.assert_close(mine.cpu(), before, rtol=0, atol=8 * 8 * 2**-24)
        means = [a.cpu() for a in step.means]
        for mine, before in zip(means, given.means, strict=True):
            torch.testing.assert_close(mine, before * (1 - share), rtol=0, atol=8 * 8 * 2**-24)
        assert not any(differing(step.params, moved(given, rows, means)))


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_a_step_that_begins_an_interval_reads_no_mean_and_starts_where_parameters_are(bad: float | None) -> None:
    torch.manual_seed(2)
    given = lists(DTYPES["mixed"], DTYPES["mixed"])
    begins = [True, False, True, True]  # the second has a master
    if bad is not None and given.grads[0] is not None:
        given.grads[0][5] = bad
    prepared = replace(
        given,
        means=[torch.zeros_like(a) for a in given.means],
        starts=[p.float() if own else y for p, y, own in zip(given.params, given.starts, begins, strict=True)],
    )
    given.means = [torch.full_like(a, torch.nan) for a in given.means]
    given.starts = [torch.full_like(y, torch.nan) if own else y for y, own in zip(given.starts, begins, strict=True)]
    rows = rows_of(1.0)
    expected, step = step_of(prepared, rows), replace(step_of(given, rows), begins=begins)
    for made in (expected, step):
        made.make()
    assert bool(step.finite) == bool(expected.finite) == (bad is None)
    for role in ("momenta", "means", "starts", "params"):
        assert not any(differing(getattr(step, role), [t.cpu() for t in getattr(expected, role)])), role


def test_a_bad_gradient_of_a_dead_entry_counts_for_nothing() -> None:
    given = lists([torch.float32], [torch.float32])
    assert given.grads[0] is not None
    given.grads[0][150] = float("nan")
    step = step_of(given, rows_of(0.5))
    step.make()
    assert bool(step.finite)
    assert step.momenta[0][150] == 0
