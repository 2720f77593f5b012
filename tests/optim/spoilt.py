"""States of which anything was removed, replaced, reshaped or added to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Draw = Callable[[st.SearchStrategy[Any]], Any]

JUNK: list[Any] = [
    None,
    True,
    -1,
    7,
    0.5,
    math.nan,
    "text",
    [],
    [1, "a"],
    (0.9, 0.99),
    {},
    {"version": 1},
    {0: {}},
    torch.zeros(()),
    torch.zeros(3),
    torch.full((5, 7), math.nan),
    torch.zeros(5, 7, dtype=torch.int64),
    torch.zeros(5, 7, dtype=torch.complex64),
    torch.zeros(5, 7).to_sparse(),
    torch.tensor(-3.0),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a state."""
    found = [path] if path else []
    if isinstance(value, dict):
        found += [place for key in value for place in places(value[key], (*path, key))]
    elif isinstance(value, (list, tuple)):
        found += [place for i, item in enumerate(value) for place in places(item, (*path, i))]
    return found


def changed(state: dict[str, Any], draw: Draw) -> dict[str, Any]:
    """A copy with one place removed, replaced, reshaped or added to."""
    made = copy.deepcopy(state)
    *way, last = draw(st.sampled_from(places(made)))
    above: Any = made
    for key in way:
        if isinstance(above[key], tuple):
            above[key] = list(above[key])
        above = above[key]
    what = draw(st.sampled_from(["remove", "replace", "reshape", "add"]))
    if what == "remove":
        del above[last]
    elif what == "reshape" and isinstance(above[last], Tensor):
        above[last] = draw(st.sampled_from([above[last].reshape(-1)[1:], above[last][None], above[last].double()]))
    elif what == "add" and isinstance(above[last], dict):
        above[last][draw(st.sampled_from(["new", 99, "exp_avg", "master"]))] = draw(st.sampled_from(JUNK))
    elif what == "add" and isinstance(above[last], list):
        above[last].append(draw(st.sampled_from(JUNK)))
    else:
        above[last] = draw(st.sampled_from(JUNK))
    return made
