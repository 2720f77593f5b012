"""The Adam benchmark makes the steps that it says, and sees a wrong one."""

from __future__ import annotations

import pytest
import torch

from onebit.benchmarks import adam
from onebit.benchmarks.case import Setting
from onebit.benchmarks.driver import Sweep, drive
from onebit.comm import make_backend

BACKEND = make_backend(None)
SWEEP = Sweep(iterations=2, warmup=1)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_makes_the_same_step(dtype: torch.dtype, many: bool) -> None:
    cases = adam.contest((adam.OURS, *adam.TORCH), many=many)
    rows = drive(cases, [Setting(numel=5001, backend=BACKEND, dtype=dtype)], SWEEP)
    assert [row.wrong for row in rows] == [0] * 4
    assert set(rows[0].ratios) == {"fused", "foreach", "for-loop"}


def test_parameters_and_moments_of_two_dtypes_move_22_bytes_an_element() -> None:
    rows = drive(adam.mixed(), [Setting(numel=1000, backend=BACKEND)], SWEEP)
    assert [(row.nbytes, row.wrong) for row in rows] == [(28_000, 0), (22_000, 0)]


@pytest.mark.parametrize("error", ["lr", "weight_decay", "betas"])
def test_another_step_counts_as_wrong(error: str) -> None:
    other = {"lr": 2e-3, "weight_decay": 0.02, "betas": (0.9, 0.99)}[error]
    one = adam.Contestant("wrong", "", "", lambda p: torch.optim.AdamW(p, **{**adam.OPTIONS, error: other}))
    rows = drive(adam.contest([one]), [Setting(numel=5000, backend=BACKEND)], SWEEP)
    assert rows[0].wrong is not None
    assert rows[0].wrong > 4000
