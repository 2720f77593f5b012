"""What a person sees: tables, a progress bar, a line of text; nothing else here writes to a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from onebit.benchmarks.driver import Progress

if TYPE_CHECKING:
    from rich.console import Console

NEEDS = 'benchmarks need the package "rich" to print: pip install "onebit[bench]"'


def console(*, stderr: bool = False) -> Console:
    """A rich console.

    Raises:
        SystemExit: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise SystemExit(NEEDS) from error
    return Console(stderr=stderr, highlight=False)


def say(text: str, *, stderr: bool = False) -> None:
    """One line, as it is."""
    console(stderr=stderr).print(text, markup=False, soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """A table; the first column is text, the others stand to the right; a `#wrong` above 0 is red.

    No figure is cut off: a table that is wider than the terminal runs over its edge.
    """
    out = console()
    from rich.box import SIMPLE_HEAD
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        head = column.replace(" ", "\n", 1)
        table.add_column(head, justify="left" if column == columns[0] else "right", no_wrap=True, vertical="bottom")
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*cells, style="bold red" if row.get("#wrong", "0") not in ("0", "-") else None)
    out.width = max(out.width, Measurement.get(out, out.options.update(max_width=1000), table).maximum)
    out.print(title, style="bold", soft_wrap=True, markup=False)
    out.print(table)


@contextlib.contextmanager
def progress_bar(total: int, *, show: bool = True) -> Iterator[Progress]:
    """Yields a function to call after each of `total` runs; on a terminal it moves a bar."""
    if not show:
        yield lambda name: None
        return
    out = console(stderr=True)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("preparing", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)
