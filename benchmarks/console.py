"""What a person sees: tables, a progress bar, a line of text; nothing else here writes to a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from onebit.benchmarks.driver import Progress

if TYPE_CHECKING:
    from rich.console import Console

NEEDS = 'benchmarks need the package "rich" to print: pip install "onebit[bench]"'
WIDTH = 132  # of tables where output goes to a file or a pipe


def console(*, stderr: bool = False) -> Console:
    """A rich console, wide enough for a table where nobody tells its width.

    Raises:
        SystemExit: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise SystemExit(NEEDS) from error
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=WIDTH)


def say(text: str, *, stderr: bool = False) -> None:
    """One line, as it is."""
    console(stderr=stderr).print(text, markup=False, soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """A table; the first column is text, the others stand to the right; a `#wrong` above 0 is red."""
    out = console()
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        head = column.replace(" ", "\n", 1)
        table.add_column(head, justify="left" if column == columns[0] else "right", no_wrap=True, vertical="bottom")
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*cells, style="bold red" if row.get("#wrong", "0") not in ("0", "-") else None)
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
