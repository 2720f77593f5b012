"""Every code block of the documentation does what the page says, from the first to the last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.docs.blocks import NOT_RUN, PAGES, ROOT, SNIPPET, Reader, blocks_of, commands, commands_of, is_run

WITH_BLOCKS = {str(page.relative_to(ROOT)): blocks for page in PAGES if (blocks := blocks_of(page))}
STARTING_RANKS = {
    name
    for name, blocks in WITH_BLOCKS.items()
    if any(is_run(command) for block in blocks if block.language == "sh" for command in commands_of(block))
}


@pytest.mark.parametrize(
    "page", [pytest.param(name, marks=pytest.mark.slow if name in STARTING_RANKS else []) for name in WITH_BLOCKS]
)
def test_the_blocks_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Reader(tmp_path).read(WITH_BLOCKS[page])


def test_every_file_that_a_page_lets_its_reader_write_is_run_there() -> None:
    for blocks in WITH_BLOCKS.values():
        run = " ".join(block.text for block in blocks if block.language in ("sh", "bash"))
        for block in blocks:
            if block.language == "python" and block.title and not SNIPPET.match(block.text):
                assert re.search(rf"\b{re.escape(block.title)}\b", run), f"{block.place}: {block.title} is never run"


def test_no_block_hides_from_the_collector() -> None:
    """One that is indented, as in a note, is no fence in CommonMark, though the site would show it as one."""
    for page in PAGES:
        fences = sum(line.lstrip().startswith("```") for line in page.read_text().splitlines())
        assert fences == 2 * sum(not block.hidden for block in blocks_of(page)), page


@pytest.mark.parametrize("pattern", [pattern for pattern, _, _ in NOT_RUN])
def test_every_exemption_is_needed(pattern: str) -> None:
    assert any(re.search(pattern, command) for _, command in commands())


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ('```python title="a.py"\nraise SystemExit(3)\n```\n\n```sh\npython a.py  # ends\n```\n', AssertionError),
        ("```sh\nmake nothing-of-the-kind\n```\n", AssertionError),
        ("```sh\npip install '.[nothing]'\n```\n", AssertionError),
        ("```sh\npython -m onebit.benchmarks.nothing\n```\n", AssertionError),
        ("```sh\npython examples/nothing.py\n```\n", AssertionError),
        ('```python\n--8<-- "examples/nothing.py"\n```\n', AssertionError),
        ("```diff\n-a = 1\n+a = = 2\n```\n", SyntaxError),
        ("```\nlost\n```\n", AssertionError),
        ("<!-- setup\ny = 3\n-->\n\n```python\nassert y == 4\n```\n", AssertionError),
    ],
)
def test_a_page_that_is_wrong_is_found_out(text: str, error: type[BaseException], tmp_path: Path) -> None:
    blocks = blocks_of(ROOT / "docs" / "imagined.md", text)
    with pytest.raises(error):
        Reader(tmp_path).read(blocks)
