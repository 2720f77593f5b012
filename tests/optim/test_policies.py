"""The schedules of 0/1 Adam: what the paper's recurrences give, at any step and without any memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebit.compress import InputError
from onebit.optim.policies import SyncPolicy, VariancePolicy

FEW = settings(max_examples=60)
SMALL = st.integers(1, 40)
HORIZON = 600


def walked_variance(freeze: int, scaler: int, horizon: int) -> list[int]:
    """The recurrence as it is published: k_{j+1} = k_j + 2^⌊j/κ⌋."""
    steps, at = [], 1
    for j in itertools.count():
        if at > min(freeze, horizon):
            return steps
        steps.append(at)
        at += 2 ** (j // scaler)
    raise AssertionError


def walked_syncs(freeze: int, scaler: int, clipper: int, horizon: int) -> list[int]:
    """Every step up to the freeze; then gaps whose length follows from the number of steps made since."""
    steps = list(range(1, min(freeze, horizon) + 1))
    at = freeze
    while True:
        at += min(2 ** ((at - freeze) // scaler), clipper)
        if at > horizon:
            return steps
        steps.append(at)


@FEW
@given(freeze=st.integers(1, 700), scaler=SMALL)
def test_variance_steps_are_those_of_the_recurrence(freeze: int, scaler: int) -> None:
    policy = VariancePolicy(var_freeze_step=freeze, var_update_scaler=scaler)
    expected = walked_variance(freeze, scaler, HORIZON)
    assert [step for step in range(-3, HORIZON + 1) if policy.updates(step)] == expected
    assert [policy.count(step) for step in (0, *expected)] == list(range(len(expected) + 1))


@FEW
@given(freeze=st.integers(1, 100), scaler=SMALL, clipper=SMALL)
def test_synchronised_steps_are_those_of_the_recurrence(freeze: int, scaler: int, clipper: int) -> None:
    policy = SyncPolicy(var_freeze_step=freeze, local_step_scaler=scaler, local_step_clipper=clipper)
    expected = walked_syncs(freeze, scaler, clipper, HORIZON)
    assert [step for step in range(-3, HORIZON + 1) if policy.synchronises(step)] == expected
    assert [policy.count(step) for step in (0, *expected)] == list(range(len(expected) + 1))


@FEW
@given(freeze=st.integers(1, 100), update=SMALL, local=SMALL, clipper=SMALL, step=st.integers(1, HORIZON))
def test_every_variance_step_is_a_synchronised_step_of_a_gap_of_one(
    freeze: int, update: int, local: int, clipper: int, step: int
) -> None:
    variance = VariancePolicy(var_freeze_step=freeze, var_update_scaler=update)
    sync = SyncPolicy(var_freeze_step=freeze, local_step_scaler=local, local_step_clipper=clipper)
    if variance.updates(step):
        assert sync.synchronises(step)
        assert step == 1 or sync.synchronises(step - 1)


@FEW
@given(freeze=st.integers(1, 60), local=SMALL, clipper=SMALL)
def test_gaps_never_shrink_and_never_exceed_the_clipper(freeze: int, local: int, clipper: int) -> None:
    policy = SyncPolicy(var_freeze_step=freeze, local_step_scaler=local, local_step_clipper=clipper)
    steps = [step for step in range(1, HORIZON + 1) if policy.synchronises(step)]
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert gaps == sorted(gaps)
    assert max(gaps) <= clipper


@FEW
@given(
    step=st.integers(1, 10**15),
    freeze=st.integers(1, 10**15),
    update=st.integers(1, 10**6),
    local=st.integers(1, 10**6),
    clipper=st.integers(1, 10**6),
)
def test_counts_and_membership_agree_at_steps_too_far_to_walk_to(
    step: int, freeze: int, update: int, local: int, clipper: int
) -> None:
    variance = VariancePolicy(var_freeze_step=freeze, var_update_scaler=update)
    sync = SyncPolicy(var_freeze_step=freeze, local_step_scaler=local, local_step_clipper=clipper)
    assert variance.count(step) - variance.count(step - 1) == variance.updates(step)
    assert sync.count(step) - sync.count(step - 1) == sync.synchronises(step)
    assert 1 <= variance.count(step) <= sync.count(step) <= step


def test_the_first_steps_with_the_published_settings() -> None:
    variance = VariancePolicy(var_freeze_step=12_500, var_update_scaler=16)
    first = [step for step in range(1, 60) if variance.updates(step)]
    assert first == [*range(1, 18), *range(19, 50, 2), 53, 57]
    sync = SyncPolicy(var_freeze_step=12_500, local_step_scaler=32_678, local_step_clipper=16)
    doubled = 12_500 + 32_678  # where the gap becomes 2
    assert [step for step in range(doubled - 1, doubled + 6) if sync.synchronises(step)] == [
        doubled - 1,
        doubled,
        doubled + 2,
        doubled + 4,
    ]


def test_the_published_run_of_bert_meets_in_less_than_half_of_its_steps_and_hardly_ever_in_full() -> None:
    # BERT-Large has 152,000 steps; published are up to 54 % fewer rounds than that.
    variance = VariancePolicy(var_freeze_step=12_500)
    sync = SyncPolicy(var_freeze_step=12_500)
    dense, rounds = variance.count(152_000), sync.count(152_000)
    assert dense == 153  # 16 of each of the gaps 1 to 256, step 1, and 8 of 512
    assert rounds < 0.5 * 152_000
    # A dense round is 31.03 compressed ones; the same run in fp32 has a dense round in each step.
    assert 152_000 / (dense + (rounds - dense) / 31.03) > 26


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "16"])
@pytest.mark.parametrize("name", ["var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"])
def test_a_count_that_is_none_is_refused_by_its_name(name: str, value: Any) -> None:
    policy = SyncPolicy if name.startswith("local") else VariancePolicy
    with pytest.raises(InputError, match=f"ZeroOneAdam: {name} must be an int of at least 1, got {value!r}"):
        policy(**{"var_freeze_step": 10, name: value})
