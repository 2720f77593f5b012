"""The loop: right results count no wrong element, a planted error counts, and ratios are paired within a round."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onebit.benchmarks import CASES, Case, Row, Setting, Sweep, drive, select
from onebit.benchmarks.collectives import Exchange
from onebit.comm import make_backend, run_threads
from onebit.comm.backend import Backend

QUICK = Sweep(iterations=2, warmup=1)
NUMELS = (1, 1000, 1024, 5000)  # less than a block, less than a block and odd, a block, several and a rest


def sleeper(name: str, seconds: Callable[[int], float], **options: Any) -> Case[list[int]]:
    """A case that sleeps as long as `seconds` says for its run number, and moves 1e9 bytes."""

    def run(state: list[int]) -> None:
        state.append(0)
        time.sleep(seconds(len(state)))

    return Case(
        name=name,
        summary=name,
        family="sleepers",
        moved=lambda setting: 1e9,
        inputs=lambda setting: [],
        run=run,
        check=lambda state: lambda: 0,
        **options,
    )


def alone(numel: int, **options: Any) -> Setting:
    return Setting(numel=numel, backend=make_backend(None), **options)


def average(backend: Backend, cases: list[Case[Any]], numel: int, dtype: torch.dtype) -> list[Row]:
    return drive(cases, [Setting(numel=numel, backend=backend, dtype=dtype)], QUICK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", NUMELS)
def test_every_kernel_case_is_right_at_sizes_off_the_block_grid(numel: int, dtype: torch.dtype) -> None:
    [kernels] = select(["kernels"])
    rows = drive(kernels, [alone(numel, dtype=dtype, payloads=3)], QUICK)
    assert {row.case: row.wrong for row in rows} == {case.name: 0 for case in kernels}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_averages_are_right_on_ranks_that_are_threads(ranks: int) -> None:
    [collectives] = select(["collectives"])
    for rows in run_threads(ranks, average, collectives, 5000, torch.float32):
        assert {row.case: row.wrong for row in rows} == {"all_reduce": 0, "compressed": 0}


def test_every_rank_reports_the_same_times() -> None:
    [collectives] = select(["collectives"])
    first, second = run_threads(2, average, collectives, 1024, torch.float32)
    assert [row.seconds for row in first] == [row.seconds for row in second]


def test_wire_bytes_counted_equal_the_formula_where_blocks_divide_evenly() -> None:
    [collectives] = select(["collectives"])
    rows = run_threads(2, average, collectives, 64 * 1024, torch.float32)[0]
    assert [(row.wire_bytes, row.wire_formula) for row in rows] == [(262144, 262144), (8448, 8448)]


@pytest.mark.parametrize("name", ["encode", "reduce_encode", "decode"])
def test_a_flipped_bit_makes_wrong_non_zero(name: str) -> None:
    [[case]] = select([name])

    def broken(state: Any) -> None:
        case.run(state)
        output = state.x.view(torch.uint8) if name == "decode" else state.payload
        output[3] ^= 128

    [row] = drive([dataclasses.replace(case, run=broken)], [alone(5000)], QUICK)
    assert row.wrong == 1


def test_an_error_on_one_rank_makes_wrong_non_zero_on_all() -> None:
    [[case]] = select(["compressed"])

    def broken(state: Exchange) -> None:
        case.run(state)
        if state.setting.backend.rank == 1:
            state.tensor[17] *= -1

    rows = run_threads(2, average, [dataclasses.replace(case, run=broken)], 5000, torch.float32)
    # The element itself, and all of rank 1's because its bytes are not rank 0's.
    assert [row.wrong for [row] in rows] == [5001, 5001]


def test_a_ratio_is_the_median_of_pairs_of_one_round() -> None:
    # Both sides slow down threefold in every second round, as on a machine that others use too.
    pace: Callable[[int], float] = lambda run: 0.03 if run % 2 else 0.01  # noqa: E731
    yardstick = sleeper("plain", lambda run: 2 * pace(run), role="plain")
    case = sleeper("case", pace, against=("plain",))
    row = drive([yardstick, case], [alone(1)], Sweep(iterations=6, warmup=2))[1]
    assert row.ratios["plain"].low == pytest.approx(2.0, rel=0.25)  # sleeps end late when the machine is busy
    assert row.ratios["plain"].median == pytest.approx(2.0, rel=0.25)


def test_the_yardstick_is_the_fastest_of_its_role() -> None:
    slow, fast = (sleeper(f"copy-{i}", lambda run, s=s: s, role="copy") for i, s in enumerate((0.06, 0.02)))
    rows = drive([slow, fast, sleeper("case", lambda run: 0.02, against=("copy",))], [alone(1)], QUICK)
    assert rows[2].ratios["copy"].median == pytest.approx(1.0, rel=0.4)


def test_a_case_without_its_yardstick_has_no_ratio() -> None:
    [row] = drive([sleeper("case", lambda run: 0.0, against=("copy",))], [alone(1)], QUICK)
    assert row.ratios == {}


def test_warm_up_runs_are_not_counted() -> None:
    [row] = drive([sleeper("case", lambda run: 0.1 if run < 3 else 0.0)], [alone(1)], Sweep(iterations=3, warmup=2))
    assert len(row.seconds) == 3
    assert max(row.seconds) < 0.1


def test_unchecked_rows_say_so() -> None:
    [row] = drive([sleeper("case", lambda run: 0.0)], [alone(1)], Sweep(iterations=1, warmup=0, check=False))
    assert row.wrong is None


def test_an_unknown_case_is_refused_with_the_list_of_good_ones() -> None:
    with pytest.raises(ValueError, match=r"no case nonsense; there are all_reduce, .*encode"):
        select(["encode", "nonsense"])


def test_case_names_are_unique_and_yardsticks_exist() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    roles = {case.role for case in CASES}
    assert all(set(case.against) <= roles for case in CASES)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"warmup": -1}])
def test_a_sweep_that_times_nothing_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="iterations >= 1"):
        Sweep(**options)  # type: ignore[arg-type]
