"""The one table of cases, and how `--cases` picks from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onebit.benchmarks.adam import ADAM, ADAM_RANKS
from onebit.benchmarks.case import Case
from onebit.benchmarks.collectives import COLLECTIVES, MODES
from onebit.benchmarks.groups import GROUPS
from onebit.benchmarks.kernels import KERNELS
from onebit.benchmarks.onebit_steps import STEPS
from onebit.benchmarks.peers import PEERS
from onebit.benchmarks.stages import STAGES
from onebit.benchmarks.yardsticks import YARDSTICKS

CASES: tuple[Case[Any], ...] = (
    *YARDSTICKS,
    *KERNELS,
    *COLLECTIVES,
    *MODES,
    *STAGES,
    *PEERS,
    *GROUPS,
    *STEPS,
    *ADAM,
    *ADAM_RANKS,
)


def select(names: Iterable[str], cases: tuple[Case[Any], ...] = CASES) -> list[list[Case[Any]]]:
    """The cases named by their own names or by their family's, grouped by family.

    Raises:
        ValueError: a name is neither; the message lists the good ones.
    """
    wanted = set(names)
    known = {case.name for case in cases} | {case.family for case in cases}
    if wanted - known:
        raise ValueError(f"no case {', '.join(sorted(wanted - known))}; there are {', '.join(sorted(known))}")
    families = dict.fromkeys(case.family for case in cases)
    groups = [[case for case in cases if case.family == family and {case.name, family} & wanted] for family in families]
    return [group for group in groups if group]
