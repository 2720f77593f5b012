"""Two records side by side: the table and the sentences that end the demo."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from record import Record
from rich.table import Table

PHASES = {"warmup": "warm-up", "compressed": "compressed"}


def table(records: Mapping[str, Record]) -> Table:
    """One column for each of two runs and one that compares them; phases are those of the second run."""
    plain, onebit = records.values()
    result = Table(caption="bytes are those one rank sends; update is averaging + optimizer step")
    result.add_column("", no_wrap=True)
    for label in (*records, "compared"):
        result.add_column(label, justify="right")

    losses = f"{plain.held_out_loss:.4f}", f"{onebit.held_out_loss:.4f}"
    result.add_row("held-out loss, nats/byte", *losses, f"x {loss_ratio(plain, onebit):.4f}")
    for phase, name in PHASES.items():
        result.add_row(f"bytes/step, {name}", *_bytes(*_typical("wire_bytes", phase, plain, onebit)))
    result.add_row("bytes, whole run", *_bytes(sum(plain.wire_bytes), sum(onebit.wire_bytes)))
    for column, title in (("seconds", "time/step"), ("update_seconds", "update/step")):
        for phase, name in PHASES.items():
            result.add_row(f"{title}, {name}", *_times(*_typical(column, phase, plain, onebit)))
    return result


def summary(records: Mapping[str, Record]) -> str:
    """The two figures that matter, in words, whatever they are."""
    plain, onebit = records.values()
    before, after = _typical("wire_bytes", "compressed", plain, onebit)
    return (
        f"loss ratio {loss_ratio(plain, onebit):.4f} (held-out loss of OnebitAdam / of AdamW)\n"
        f"byte ratio {_quotient(before, after):.2f} (bytes per step, plain fp32 / compressed)"
    )


def loss_ratio(plain: Record, onebit: Record) -> float:
    """OnebitAdam's held-out loss in units of AdamW's."""
    return onebit.held_out_loss / plain.held_out_loss


def _typical(column: str, phase: str, plain: Record, onebit: Record) -> tuple[float, float]:
    """The median of `column` in both runs, over the steps that the second run made in `phase`."""
    steps = [step for step, name in enumerate(onebit.phase) if name == phase]
    first, second = ([getattr(run, column)[step] for step in steps] or [0] for run in (plain, onebit))
    return median(first), median(second)


def _bytes(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:,.0f}", f"{after:,.0f}", f"1 / {_quotient(before, after):.2f}"


def _times(before: float, after: float) -> tuple[str, str, str]:
    return f"{1e3 * before:.1f} ms", f"{1e3 * after:.1f} ms", f"x {_quotient(after, before):.2f}"


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
