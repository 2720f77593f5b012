"""A short form of the soak, and that its verdict is no formality."""

from __future__ import annotations

import pytest

from tests.faults.soak import GROWTH, SLACK, Endured, found, soak_all
from tests.faults.training import MAKERS


@pytest.mark.parametrize("name", MAKERS)
def test_steps_cost_no_memory_feedback_stays_bounded_and_ranks_hold_the_same_bits(name: str) -> None:
    row = soak_all(name, ranks=2, steps=100)
    assert row["said"] == []
    assert row["wrong"] == 0


def endured(memory_growth: int = 0, feedback_growth: float = 1.0, final: str = "same") -> Endured:
    seen = Endured(final=final)
    for look in range(100):
        seen.memory.append((300 << 20) + memory_growth * look // 50)
        seen.feedback.append(20.0 * (feedback_growth if look == 60 else 1.0))
    return seen


def test_a_leak_feedback_that_grows_and_other_bits_are_found() -> None:
    assert found([endured(), endured()]) == []
    assert "the memory of rank 1 grew by" in found([endured(), endured(memory_growth=SLACK)])[0]
    assert "error feedback of rank 0 grew 1.30-fold" in found([endured(feedback_growth=GROWTH * 1.04), endured()])[0]
    assert "rank 0 grew nan-fold" in found([endured(feedback_growth=float("nan")), endured()])[0]
    assert found([endured(), endured(final="other")]) == ["the ranks ended with different bits"]


def test_ranks_that_fail_are_told_of() -> None:
    row = soak_all("no such optimizer", ranks=2, steps=100)
    assert row["wrong"] == 1
    assert "KeyError" in row["said"][0]
