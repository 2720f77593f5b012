"""What a person sees: no figure is cut off, and a package that is missing is named."""

from __future__ import annotations

import sys

import pytest

from onebit.benchmarks import console, view
from onebit.benchmarks.record import Document


def test_a_narrow_terminal_cuts_off_no_figure(
    document: Document, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = view.terminal(document)
    console.show_table(view.title(document), view.columns(rows), rows)
    shown = capsys.readouterr().out
    assert all(cell in shown for row in rows for cell in row.values())


def test_the_last_column_is_the_count_of_wrong_elements(document: Document) -> None:
    assert view.columns(view.terminal(document))[-1] == "#wrong"


def test_without_rich_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit, match=r'pip install "onebit\[bench\]"'):
        console.say("anything")


def test_a_progress_bar_that_is_not_shown_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with console.progress_bar(3, show=False) as progress:
        progress("encode")
