"""An all_reduce that is cut over several process groups sums what the whole one sums, and errors in it are counted."""

from __future__ import annotations

import torch

from onebit.benchmarks import select
from onebit.benchmarks.case import Setting
from onebit.comm import Backend
from tests.comm.launcher import run_ranks


def check_parts(backend: Backend, numel: int) -> tuple[bool, int, int]:
    """Whether the parts add up to the sum over ranks; and what the case counts as wrong, of that and with an error."""
    [[case]] = select(["group-all_reduce-split"])
    setting = Setting(numel=numel, backend=backend)
    state = case.inputs(setting)
    wrong = case.check(state)
    case.run(state)
    right = torch.allclose(state.tensor, torch.stack(setting.normals()).sum(0), atol=1e-6)
    counted = wrong()
    state.tensor[numel // 2] += 1
    return right, counted, wrong()


def test_the_parts_make_the_whole() -> None:
    for right, counted, with_error in run_ranks("gloo", 2, check_parts, 1003):
        assert right
        assert counted == 0
        assert with_error == 1
