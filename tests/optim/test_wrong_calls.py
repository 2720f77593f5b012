"""A short form of the random wrong calls: every kind of them is met, and none is accepted or leaves a trace."""

from __future__ import annotations

import pytest

from onebit.comm import InputError
from tests.faults.wrong_calls import CALLS, Call, Tally, wrong_calls


@pytest.mark.filterwarnings("ignore")  # torch warns of duplicate parameters and of sparse layouts, as it should
def test_random_wrong_calls_end_with_documented_errors_and_change_nothing() -> None:
    tally = wrong_calls(300, 0)
    assert tally.said == []
    assert tally.by_kind.keys() == {kind.__name__ for kind in CALLS}


def test_a_call_that_is_accepted_or_raises_anything_else_or_changes_something_is_told() -> None:
    tally, numbers = Tally(), [0]

    def spoil() -> None:
        numbers.append(1)
        raise InputError("too late")

    tally.count("fine", Call(what="x", make=lambda: int("x"), also=(ValueError,)))
    assert tally.said == []
    tally.count("accepted", Call(what="x", make=lambda: None))
    tally.count("undocumented", Call(what="x", make=lambda: [][0]))
    tally.count("changing", Call(what="x", make=spoil, seen=lambda: list(numbers)))
    assert tally.said == [
        "accepted of x: it was accepted",
        "undocumented of x: IndexError, which is not documented: list index out of range",
        "changing of x: it has changed something",
    ]
    assert (tally.calls, tally.errors) == (4, {"ValueError": 1, "InputError": 1})
