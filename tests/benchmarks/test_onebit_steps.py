"""The case of a compressed step measures steps that are right, and notices one that is not."""

from __future__ import annotations

import torch

from onebit.benchmarks.case import Setting
from onebit.benchmarks.driver import Sweep, drive
from onebit.benchmarks.onebit_steps import STEPS, Training
from onebit.benchmarks.row import Row
from onebit.comm import Backend, run_threads

NUMEL = 16384  # whole blocks for each rank, for which the formula of bytes is exact


def rows(backend: Backend) -> dict[str, Row]:
    made = drive(STEPS, [Setting(numel=NUMEL, backend=backend)], Sweep(iterations=2, warmup=1))
    return {row.case: row for row in made}


def test_every_case_is_right_and_sends_what_the_formula_says() -> None:
    for found in run_threads(2, rows):
        assert {row.wrong for row in found.values()} == {0}
        assert found["AdamW"].wire_bytes == 0
        for name in ("OnebitAdam", "OnebitAdam by operations"):
            assert found[name].wire_bytes == found[name].wire_formula
        assert set(found["OnebitAdam"].ratios) == {"AdamW", "operations"}
        assert "update" in found["OnebitAdam"].stages
        assert "update" not in found["OnebitAdam by operations"].stages


def test_one_parameter_that_is_off_by_its_last_place_is_counted() -> None:
    def spoil(backend: Backend) -> int:
        (case,) = [case for case in STEPS if case.name == "OnebitAdam"]
        state: Training = case.inputs(Setting(numel=NUMEL, backend=backend))
        wrong = case.check(state)
        case.run(state)
        with torch.no_grad():
            state.param[7] = torch.nextafter(state.param[7], torch.tensor(torch.inf))
        return wrong()

    assert run_threads(2, spoil) == [1, 1]
