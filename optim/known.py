"""Which parameters of a group take part once warm-up is over."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from onebit.optim.exchange import GroupReducers

_log = logging.getLogger(__name__)


def known_indices(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    states: Mapping[Tensor, Any],
    reducers: GroupReducers,
) -> list[int]:
    """The indices of parameters that warm-up has made a variance for; the others are left alone.

    The first time that one of the others has a gradient on this rank, a warning says what to do about it.
    """
    known = [i for i, p in enumerate(params) if "step" in states.get(p, {})]
    late = sorted({i for i, g in enumerate(gradients) if g is not None} - set(known))
    if late and reducers.first_warning():
        _log.warning(
            "rank %d: parameters %s have their first gradient after the freeze, so there is no variance for them and "
            "they are not updated; give them to add_param_group, where they make a warm-up of their own",
            reducers.backend.rank,
            late,
        )
    return known
