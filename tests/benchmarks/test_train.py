"""Training runs: who takes part learns what it should, and what is said of a run follows from its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onebit.benchmarks import record, report, train, training_view
from onebit.benchmarks.contenders import PLAIN, Plan
from onebit.benchmarks.training import ALONE, Log, estimate, learning_rate, row

TINY = ["--width=32", "--layers=1", "--heads=2", "--context=32", "--steps=20", "--exact=5", "--lr=0.003"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> record.Document:
    """All contenders on two ranks over loopback."""
    folder = tmp_path_factory.mktemp("results")
    assert train.main([*TINY, f"--output={folder}", "--plot"]) == 0
    [path] = Path(folder).glob("*-train-loopback-*.json")
    assert path.with_suffix(".png").stat().st_size > 1000
    return record.load(path)


def of(result: record.Document, name: str) -> dict[str, Any]:
    (found,) = [found for found in result["rows"] if found["case"] == name]
    return dict(found)


def test_ranks_hold_the_same_model_after_the_run(trained: record.Document) -> None:
    assert {found["case"] for found in trained["rows"] if not found["replicas_equal"]} == {ALONE}


def test_every_contender_makes_the_steps_of_its_schedule(trained: record.Document) -> None:
    assert of(trained, PLAIN)["steps"] == {"exact": 20}
    assert of(trained, "AdamW, fp16_compress_hook")["steps"] == {"compressed": 20}
    assert of(trained, "AdamW, PowerSGD of rank 4")["steps"] == {"exact": 5, "compressed": 15}
    assert of(trained, "OnebitAdam")["steps"] == {"exact": 5, "compressed": 15}
    assert set(of(trained, "ZeroOneAdam")["steps"]) == {"exact", "compressed", "local"}


def test_all_start_from_one_model_and_an_exact_step_of_onebit_adam_is_adamws(trained: record.Document) -> None:
    ours, plain = (of(trained, name)["held_out"] for name in ("OnebitAdam", PLAIN))
    assert [point["step"] for point in ours] == list(range(2, 21, 2))
    for mine, theirs in zip(ours[:2], plain[:2], strict=True):  # steps 2 and 4 of a warm-up of 5
        # Sums of two numbers are exact in any order; fused and foreach AdamW round differently.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_everybody_learns(trained: record.Document) -> None:
    for found in trained["rows"]:
        if found["case"] != ALONE:
            losses = [point["loss"] for point in found["held_out"]]
            assert losses[-1] < losses[0], found["case"]


def test_a_table_for_people_and_one_for_the_documentation(trained: record.Document) -> None:
    text = report.fill("<!-- results: train-loopback -->\n<!-- end -->", {"train-loopback": [trained]})
    assert "| OnebitAdam | exact | 25% |" in text
    assert "|  | compressed | 75% |" in text
    assert "communicates for" in text


def test_a_short_run_times_steps_and_takes_what_was_learned_from_a_whole_one(trained: record.Document) -> None:
    short = {**trained, "run": {**trained["run"], "learns": False}}
    short["rows"] = [
        {key: value for key, value in found.items() if key not in ("held_out", "to_target")}
        for found in trained["rows"]
    ]
    assert training_view.whole_run(short, {"whole": [trained]}) is trained
    lines = {line["optimizer"]: line for line in training_view.cells(short, trained)}
    assert lines[PLAIN]["time to loss"] == "1.00, by its steps"
    assert training_view.whole_run({**short, "kind": "another"}, {"whole": [trained]}) is None
    assert all(line["time to loss"] == "" for line in training_view.cells(short))


def test_a_run_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="root of a checkout"):
        train.main([])


def a_log(seconds: float, losses: list[float]) -> Log:
    """Ten steps, the first four exact, evaluated after 5 and 10."""
    kinds = ["exact"] * 4 + ["compressed"] * 6
    return Log(kinds=kinds, seconds=[seconds] * 10, sent=[], held_out=[(5, losses[0]), (10, losses[1])])


def test_the_time_to_a_loss_lies_between_the_evaluations_around_it() -> None:
    plain, mine = a_log(1.0, [3.0, 2.0]), a_log(0.5, [2.54, 1.54])
    reached = row("mine", mine, plain, 100)["to_target"]
    assert reached["loss"] == pytest.approx(2.04)
    assert reached["steps"] == {"exact": 4, "compressed": 4}  # 2.04 lies half-way between 2.54 and 1.54: 7.5 steps
    assert reached["seconds"] == pytest.approx(4.0)


def test_a_loss_that_is_not_reached_has_no_time() -> None:
    assert row("mine", a_log(0.5, [4.0, 3.0]), a_log(1.0, [3.0, 2.0]), 100)["to_target"] is None


def test_first_steps_of_a_kind_count_for_no_time() -> None:
    log = a_log(1.0, [1.0, 1.0])
    log.seconds = [9.0, 9.0, 1.0, 2.0, 9.0, 9.0, 3.0, 3.0, 3.0, 3.0]
    assert {kind: numbers["median"] for kind, numbers in log.by_kind(log.seconds).items()} == {
        "exact": 1.5,
        "compressed": 3.0,
    }


def test_an_estimate_is_a_sum_over_kinds_and_none_where_one_was_not_timed() -> None:
    assert estimate({"exact": 2, "compressed": 3}, {"exact": {"median": 1.0}, "compressed": {"median": 0.5}}) == 3.5
    assert estimate({"exact": 2}, {}) is None


def test_the_learning_rate_rises_before_the_freeze_and_ends_near_zero() -> None:
    plan = Plan(steps=100, exact=20, sparse=10, lr=1.0)
    rates = [learning_rate(number, plan) for number in range(plan.steps)]
    assert rates[9] == max(rates) == 1.0
    assert rates[-1] == pytest.approx(1 / 90)
