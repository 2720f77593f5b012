"""One figure of the summary, and how it is found in a result of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onebit.benchmarks import training_view, view
from onebit.benchmarks.contenders import PLAIN
from onebit.benchmarks.record import Document

Spread = Mapping[str, float]
Figure = tuple[str, Spread]  # what it was measured on, and how many times as fast: median, and quartiles if known
Pick = Callable[[Document], Figure | None]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One figure of the results of a name, and what it stands beside.

    what: ``{}`` is where the tensor or the model goes; goal: what the project asks of itself, None for nothing;
    measure: what it stands beside is a measure and no alternative, so a figure below 1 is no loss; over: the backend of
    the results that it is taken from, None for any.
    """

    result: str
    what: str
    beside: str
    pick: Pick
    goal: float | None = None
    measure: bool = False
    over: str | None = None

    def figure(self, result: Document) -> Figure | None:
        """What a result of this name has to say; None: nothing."""
        return self.pick(result) if self.over is None or result["run"]["backend"] == self.over else None


def ratio(case: str, role: str, numel: int | None = None, dtype: str = "float32") -> Pick:
    """A case's ratio to a yardstick, at the largest size unless told."""

    def pick(result: Document) -> Figure | None:
        alike = [
            row for row in result["rows"] if (row["case"], row["dtype"]) == (case, dtype) and role in row["ratios"]
        ]
        sized = [row for row in alike if numel in (None, row["numel"])]
        row = max(sized, key=lambda row: int(row["numel"]), default=None)
        return None if row is None else (view.tensor(row), row["ratios"][role])

    return pick


def trained(optimizer: str, kind: str) -> Pick:
    """One kind of a contender's steps beside those of plain AdamW."""

    def pick(result: Document) -> Figure | None:
        spread = training_view.named(result["rows"], optimizer)["times_plain"].get(kind)
        return spread and (_model(result), spread)

    return pick


def to_the_loss(optimizer: str) -> Pick:
    """A contender's whole run beside plain AdamW's, each until it has the held-out loss at which that one ends."""

    def pick(result: Document) -> Figure | None:
        ends = [training_view.named(result["rows"], name)["to_target"] for name in (PLAIN, optimizer)]
        if None in ends:
            return None
        plain, ours = (float(end["seconds"]) for end in ends)
        return _model(result), {"median": plain / ours}

    return pick


def step(case: str) -> Pick:
    """A whole training step on GPUs beside DDP's."""

    def pick(result: Document) -> Figure | None:
        taken = result["run"]["time over DDP"].get(case)
        if taken is None:
            return None
        model = f"{result['rows'][0]['numel'] / 1e6:.0f} million parameters"
        return model, {"median": 1 / taken["median"], "low": 1 / taken["high"], "high": 1 / taken["low"]}

    return pick


def _model(result: Document) -> str:
    return f"{result['rows'][0]['parameters'] / 1e6:.1f} million parameters"
