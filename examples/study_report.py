"""What the convergence study found: in docs/convergence.md tables of all runs, and pictures of each task."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot import finish, in_megabytes
from study_plan import BASELINE, CODECS, LABELS, RECIPES
from study_train import StudyRecord

COLOURS = {
    "adamw": "#111111",
    "adamw-short": "#aaaaaa",
    "onebit-adam": "#d9541a",
    "onebit-adam-auto": "#e8a33d",
    "onebit-adam-refresh": "#a3195b",
    "zero-one-adam": "#2f5fa8",
    "onebit-adam-fp8": "#8a5a83",
    "onebit-adam-int8": "#2f5fa8",
    "onebit-adam-int4": "#3a8f4d",
    "onebit-adam-int4-stochastic": "#8fc49a",
    "onebit-adam-int4-rotated": "#b7c94c",
    "onebit-adam-two-level": "#a3195b",
    "adamw-int8": "#6b7f99",
    "adamw-int4": "#c0a98a",
    "lamb": "#777777",
    "onebit-lamb": "#3a8f4d",
    "onebit-lamb-steady": "#8fc49a",
}
DASHED = tuple(dict.fromkeys(BASELINE.values()))  # what others are measured against
SECTION = re.compile(r"(?m)^<!-- examples/study.py report: (?P<part>\S+) -->\n(?:.*\n)*?<!-- end -->$")
COLUMNS = (
    *("task", "ranks", "optimizer", "held-out loss", "to its baseline"),
    *("MB sent", "fewer bytes", "steps with traffic", "ms a step"),
)


@dataclass(frozen=True)
class Part:
    """What stands in one table, and in one picture per task.

    Attributes:
        optimizers: what it is about.
        beside: what is shown with them, on tasks that have any of them.
        suffix: of its pictures' names.
    """

    optimizers: tuple[str, ...]
    beside: tuple[str, ...] = ()
    suffix: str = ""

    def of(self, groups: Sequence[Group]) -> dict[str, list[Group]]:
        """Its groups, by task."""
        tasks = dict.fromkeys(g.task for g in groups if g.optimizer in self.optimizers)
        shown = (*self.beside, *self.optimizers)
        return {task: [g for g in groups if g.task == task and g.optimizer in shown] for task in tasks}


PARTS = {
    "optimizers": Part(tuple(name for name in LABELS if name not in CODECS)),
    "codecs": Part(CODECS, ("adamw", "onebit-adam"), "-codecs"),
}


class Group:
    """The runs of one optimizer on one task with one number of ranks, a seed each."""

    def __init__(self, records: Sequence[StudyRecord]) -> None:
        first = records[0]
        self.records = records
        self.task, self.optimizer = str(first.options["task"]), str(first.options["optimizer"])
        self.ranks = int(str(first.options["ranks"]))
        self.losses = [record.held_out_loss for record in records]
        self.loss = mean(self.losses)
        self.megabytes = mean(sum(record.wire_bytes) for record in records) / 1e6
        self.rounds = mean(sum(sent > 0 for sent in record.wire_bytes) / len(record.loss) for record in records)
        self.milliseconds = mean(sum(record.seconds) / len(record.loss) for record in records) * 1e3

    def curve(self, by_bytes: bool) -> tuple[list[float], list[list[float]]]:
        """Steps, or MB sent by each rank until then; and the held-out losses of all runs there."""
        steps = [step for step, _ in self.records[0].held_out]
        losses = [[loss for _, loss in at] for at in zip(*(record.held_out for record in self.records), strict=True)]
        if not by_bytes:
            return [float(step) for step in steps], losses
        sent = [list(accumulate(record.wire_bytes)) for record in self.records]
        return [mean(one[step - 1] for one in sent) / 1e6 for step in steps], losses


def write_report(folder: Path, docs: Path) -> list[Path]:
    """Draw and tabulate all records of `folder`; returns the files written.

    Raises:
        SystemExit: there are no records, or one is of ranks that ended with different parameters.
    """
    groups = read(folder)
    page = docs / "convergence.md"
    written = [page]

    def section(mark: re.Match[str]) -> str:
        part = PARTS[mark["part"]]
        tasks = part.of(groups)
        if not tasks:
            return mark[0]
        pictures = [draw(task, here, docs / f"convergence-{task}{part.suffix}.png") for task, here in tasks.items()]
        written.extend(pictures)
        shown = [f"![Held-out loss on {task}]({path.name})\n" for task, path in zip(tasks, pictures, strict=True)]
        rows = table([g for here in tasks.values() for g in here])
        return "\n".join([mark[0].partition("\n")[0] + "\n" + rows, *shown, "<!-- end -->"])

    page.write_text(SECTION.sub(section, page.read_text(encoding="utf-8")), encoding="utf-8")
    return written


def read(folder: Path) -> list[Group]:
    """All records, grouped, in the order of the recipes."""
    found: dict[tuple[int, int, int], list[StudyRecord]] = {}
    for path in sorted(folder.glob("**/*.json")):
        record = StudyRecord.read(path)
        if not record.ranks_agree:
            raise SystemExit(f"{path}: the ranks ended with different parameters, checksums {record.checksums}")
        o = record.options
        place = (list(RECIPES).index(str(o["task"])), int(str(o["ranks"])), list(LABELS).index(str(o["optimizer"])))
        found.setdefault(place, []).append(record)
    if not found:
        raise SystemExit(f"no records in {folder}; make them with `study.py run` or `study.py train`")
    return [Group(found[place]) for place in sorted(found)]


def table(groups: Sequence[Group]) -> str:
    """One line per group."""
    heading = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
    baselines = {(g.task, g.ranks, g.optimizer): g for g in groups}
    lines = []
    for g in groups:
        base = baselines.get((g.task, g.ranks, BASELINE[g.optimizer]))
        spread = f" ± {stdev(g.losses):.4f}" if len(g.losses) > 1 else ""
        ratio = f"{100 * (g.loss / base.loss - 1):+.2f} %" if base and base is not g else ""
        fewer = f"{base.megabytes / g.megabytes:.1f} x" if base and base is not g else ""
        lines.append(
            f"| {g.task} | {g.ranks} | {LABELS[g.optimizer]} | {g.loss:.4f}{spread} | {ratio} | {g.megabytes:.1f} | "
            f"{fewer} | {100 * g.rounds:.0f} % | {g.milliseconds:.1f} |\n"
        )
    return heading + "".join(lines)


def draw(task: str, groups: Sequence[Group], path: Path) -> Path:
    """Held-out loss against steps and against bytes, a row per number of ranks, into the PNG `path`."""
    ranks = sorted({g.ranks for g in groups})
    figure = Figure(figsize=(12, 4.6 * len(ranks)), layout="constrained")
    rows = figure.subplots(len(ranks), 2, sharey="row", squeeze=False)
    for (by_step, by_byte), n in zip(rows, ranks, strict=True):
        here = [g for g in groups if g.ranks == n]
        for g in here:
            line(by_step, g, by_bytes=False)
            line(by_byte, g, by_bytes=True)
        lowest = min(g.loss for g in here)
        second = max(max(g.curve(by_bytes=False)[1][1]) for g in here)  # the first value, far above, flattens the rest
        by_step.set_ylim(lowest - 0.05 * (second - lowest), second)
        by_step.set_ylabel("held-out loss, nats")
        by_step.legend(loc="upper right", frameon=False, fontsize="small" if len(here) > 8 else None)
        finish(by_step, f"{task}, {n} ranks: loss against steps", "step")
        finish(by_byte, "loss against bytes on the wire", "MB sent by each rank so far (log scale)")
        in_megabytes(by_byte)
    first = groups[0].records[0]
    seeds = max(len(g.records) for g in groups)
    figure.suptitle(f"{first.parameters:,} parameters; mean of {seeds} seeds, shaded from least to most")
    figure.savefig(path, dpi=110)
    return path


def line(axes: Axes, group: Group, *, by_bytes: bool) -> None:
    """One group: its mean, and the range of its runs."""
    across, losses = group.curve(by_bytes)
    colour, dashes = COLOURS[group.optimizer], "--" if group.optimizer in DASHED else "-"
    axes.plot(across, _all(mean, losses), dashes, color=colour, label=LABELS[group.optimizer], linewidth=1.7)
    axes.fill_between(across, _all(min, losses), _all(max, losses), color=colour, alpha=0.15, linewidth=0)


def _all(function: Callable[[Sequence[float]], float], rows: Iterable[Sequence[float]]) -> list[float]:
    return [function(row) for row in rows]
