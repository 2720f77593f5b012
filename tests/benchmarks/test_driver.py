"""The loop: right results count no wrong element, a planted error counts, and ratios are paired within a round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onebit.benchmarks import CASES, Case, Row, Setting, Sweep, drive, select, station
from onebit.benchmarks.collectives import Exchange
from onebit.comm import make_backend, run_threads, tuning
from onebit.comm.backend import Backend

QUICK = Sweep(iterations=2, warmup=1)
NUMELS = (1, 1000, 1024, 5000)  # less than a block, less than a block and odd, a block, several and a rest


class Clock:
    """A clock that stands still but for what cases say they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def case(self, name: str, seconds: Callable[[int], float], **options: Any) -> Case[list[int]]:
        """A case that takes `seconds` of its run number, which counts from 1, and moves 1e9 bytes."""

        def run(state: list[int]) -> None:
            state.append(0)
            self.now += seconds(len(state))

        return Case(
            name=name,
            summary=name,
            family="timed",
            moved=lambda setting: 1e9,
            inputs=lambda setting: [],
            run=run,
            check=lambda state: lambda: 0,
            **options,
        )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(station, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda seconds: None))
    return clock


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


@pytest.mark.parametrize("picked", ["plain", "compressed"])
def test_modes_are_right_and_auto_sends_what_it_picks(picked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.Tuning, "pick", lambda self, numel: picked)
    monkeypatch.setattr(tuning, "SIZES", (64,))
    [modes] = select(["modes"])
    for rows in run_threads(2, average, modes, 64 * 1024, torch.float32):
        found = {row.case: row for row in rows}
        assert {row.wrong for row in rows} == {0}
        assert found["mode-auto"].wire_bytes == found[f"mode-{picked}"].wire_formula
        assert set(found["mode-auto"].ratios) == {"mode plain", "mode compressed"}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_averages_are_right_on_ranks_that_are_threads(ranks: int) -> None:
    [collectives] = select(["collectives"])
    for rows in run_threads(ranks, average, collectives, 5000, torch.float32):
        assert {row.case: row.wrong for row in rows} == {case.name: 0 for case in collectives if not case.nodes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_averages_on_two_levels_are_right_and_an_error_in_one_element_is_counted(dtype: torch.dtype) -> None:
    [collectives] = select(["collectives"])
    [case] = [case for case in collectives if case.nodes]

    def broken(state: Exchange) -> None:
        case.run(state)
        state.tensor[17] *= -1

    def measure(backend: Backend) -> list[Row]:
        setting = Setting(numel=5000, backend=backend, dtype=dtype, local=2)
        return drive([*collectives, dataclasses.replace(case, run=broken)], [setting], QUICK)

    for rows in run_threads(4, measure):
        assert [(row.case, row.wrong) for row in rows] == [(case.name, 0) for case in collectives] + [(case.name, 4)]
        assert set(rows[-1].ratios) == {"one level", "plain"}


def test_every_rank_reports_the_same_times() -> None:
    [collectives] = select(["collectives"])
    first, second = run_threads(2, average, collectives, 1024, torch.float32)
    assert [row.seconds for row in first] == [row.seconds for row in second]


def test_wire_bytes_counted_equal_the_formula_where_blocks_divide_evenly() -> None:
    [collectives] = select(["collectives"])
    rows = run_threads(2, average, collectives, 64 * 1024, torch.float32)[0]
    expected = {"all_reduce": 262144, "all_reduce-bf16": 131072, "compressed": 8448}
    assert {row.case: row.wire_bytes for row in rows} == {row.case: row.wire_formula for row in rows} == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_half_precision_are_right(dtype: torch.dtype) -> None:
    [collectives] = select(["collectives"])
    for row in run_threads(2, average, collectives, 5000, dtype)[0]:
        assert row.wrong == 0, row.case


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("numel", NUMELS)
def test_every_stage_is_right_alone(numel: int, ranks: int) -> None:
    [stages] = select(["stages"])
    for rows in run_threads(ranks, average, stages, numel, torch.float32):
        assert {row.case: row.wrong for row in rows} == {case.name: 0 for case in stages}


@pytest.mark.parametrize("name", ["stage-all_to_all", "stage-all_gather"])
def test_a_byte_that_arrives_wrong_is_counted(name: str) -> None:
    [[case]] = select([name])

    def broken(state: Any) -> None:
        case.run(state)
        state.received[5] ^= 1

    rows = run_threads(2, average, [dataclasses.replace(case, run=broken)], 5000, torch.float32)
    assert [row.wrong for [row] in rows] == [2, 2]


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


def test_a_ratio_is_the_median_of_pairs_of_one_round(clock: Clock) -> None:
    # Both slow down tenfold in every second round, as on a machine that others use too; once, one of them alone does.
    yardstick = clock.case("plain", lambda run: 20.0 if run % 2 else 2.0, role="plain")
    case = clock.case("case", lambda run: 40.0 if run == 5 else 10.0 if run % 2 else 1.0, against=("plain",))
    row = drive([yardstick, case], [alone(1)], Sweep(iterations=6, warmup=2))[1]
    assert row.ratios["plain"].median == 2.0
    assert row.ratios["plain"].high == 2.0


def test_the_yardstick_is_the_fastest_of_its_role(clock: Clock) -> None:
    copies = [clock.case(f"copy-{seconds}", lambda run, s=seconds: s, role="copy") for seconds in (6.0, 2.0, 3.0)]
    rows = drive([*copies, clock.case("case", lambda run: 1.0, against=("copy",))], [alone(1)], QUICK)
    assert rows[-1].ratios["copy"].median == 2.0


def test_algbw_is_bytes_over_the_median_time(clock: Clock) -> None:
    [row] = drive(
        [clock.case("case", lambda run: (1.0, 9.0, 0.5, 0.0)[run - 1])], [alone(1)], Sweep(iterations=3, warmup=0)
    )
    assert row.algbw == 1.0
    assert row.seconds == (1.0, 9.0, 0.5)
    assert (row.time.low, row.time.median) == (0.5, 1.0)


def test_a_case_without_its_yardstick_has_no_ratio(clock: Clock) -> None:
    [row] = drive([clock.case("case", lambda run: 1.0, against=("copy",))], [alone(1)], QUICK)
    assert row.ratios == {}


def test_warm_up_runs_are_not_counted(clock: Clock) -> None:
    [row] = drive([clock.case("case", lambda run: float(run))], [alone(1)], Sweep(iterations=3, warmup=2))
    assert row.seconds == (3.0, 4.0, 5.0)


def test_stages_are_means_over_timed_runs(clock: Clock) -> None:
    # Run number n spends n seconds in its stage: 2 to 4 after one run of warm-up.
    case = clock.case("case", lambda run: 1.0, stages=lambda state: {"encode": float(sum(range(len(state) + 1)))})
    [row] = drive([case], [alone(1)], Sweep(iterations=3, warmup=1))
    assert row.stages == {"encode": 3.0}


def test_unchecked_rows_say_so(clock: Clock) -> None:
    [row] = drive([clock.case("case", lambda run: 1.0)], [alone(1)], Sweep(iterations=1, warmup=0, check=False))
    assert row.wrong is None


def test_an_unknown_case_is_refused_with_the_list_of_good_ones() -> None:
    with pytest.raises(ValueError, match=r"no case nonsense; there are .*all_reduce, .*encode"):
        select(["encode", "nonsense"])


def test_case_names_are_unique_and_yardsticks_exist() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    roles = {case.role for case in CASES}
    assert all(set(case.against) <= roles for case in CASES)


def test_runs_that_are_timed_as_one_share_its_time(clock: Clock) -> None:
    case = clock.case("case", lambda run: float(run))
    [row] = drive([case], [alone(1)], Sweep(iterations=2, warmup=1, together=3))
    assert row.seconds == (5.0, 8.0)  # (4 + 5 + 6) / 3 and (7 + 8 + 9) / 3


def test_a_case_is_left_out_on_a_device_that_it_does_not_run_on(clock: Clock) -> None:
    cases = [clock.case("here", lambda run: 1.0), clock.case("elsewhere", lambda run: 1.0, devices=("cuda",))]
    assert [row.case for row in drive(cases, [alone(1)], QUICK)] == ["here"]


@pytest.mark.parametrize("name", ["all_reduce", "all_reduce-bf16", "mode-plain"])
def test_an_average_that_is_off_is_counted(name: str) -> None:
    [[case]] = select([name])

    def broken(state: Exchange) -> None:
        case.run(state)
        state.tensor[17] += 0.5

    rows = run_threads(2, average, [dataclasses.replace(case, run=broken)], 5000, torch.float32)
    assert [row.wrong for [row] in rows] == [2, 2]


@pytest.mark.parametrize("options", [{"iterations": 0}, {"warmup": -1}])
def test_a_sweep_that_times_nothing_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="iterations >= 1"):
        Sweep(**options)  # type: ignore[arg-type]
