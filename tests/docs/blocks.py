"""Code blocks of a page of documentation, run in order as a reader would, in a folder of their own.

    ```python                     run, in one namespace for the whole page
    ```python title="train.py"    written to that file, for the page's commands
    ```sh                         every line is run, unless `NOT_RUN` says how it is looked at instead
    ```diff                       both sides must be Python
    ```bash title="job.sh"        written to that file; bash must be able to read it
    ```text                       formulas, listings and output: not code
    <!-- setup ... -->            Python that a reader does not see: what the blocks below it take for granted

A block whose text is ``--8<-- "file"`` shows a file that is kept elsewhere, which must have a test of its own.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from tests.comm.launcher import mpiexec

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SETUP = re.compile(r"<!-- setup\n(.*?)-->", re.DOTALL)
SNIPPET = re.compile(r'--8<-- "(.+)"')
LIMIT = 120.0  # seconds for a command
ABORTED_AT_EXIT = "terminate called without an active exception"  # by Gloo in torch 2.13, now and then, after all work
TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block, the first line of its text counted from 1."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    hidden: bool

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """The blocks of a page in their order; `text` in the place of its own."""
    found = []
    for token in MarkdownIt().parse(page.read_text() if text is None else text):
        hidden = SETUP.match(token.content) if token.type == "html_block" else None
        if token.type != "fence" and hidden is None:
            continue
        assert token.map is not None
        language, _, options = ("python", "", "") if hidden else token.info.partition(" ")
        title = re.search(r'title="(.+?)"', options)
        body, name = hidden[1] if hidden else token.content, title[1] if title else None
        line = token.map[0] + 2
        found.append(Block(page=page, line=line, language=language, title=name, text=body, hidden=bool(hidden)))
    return found


def commands_of(block: Block) -> list[str]:
    """The commands of a block of shell lines, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := shlex.join(shlex.split(line, comments=True)))]


class Reader:
    """Follows one page in an empty folder, which must be the current one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[str, Any] = {"__name__": "page"}
        self._run: dict[str, Callable[[Block], None]] = {
            "python": self._python,
            "sh": self._commands,
            "bash": self._script,
            "diff": _both_sides_are_python,
            "text": lambda block: None,
        }

    def read(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            assert block.language in self._run, f"{block.place}: say what language it is, one of {', '.join(self._run)}"
            self._run[block.language](block)

    def _python(self, block: Block) -> None:
        if SNIPPET.match(block.text):
            _shows_a_tested_file(block)
        elif block.title is not None:
            compile(block.text, block.place, "exec")
            (self._folder / block.title).write_text(block.text)
        else:  # a traceback names the page and its line
            code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", dont_inherit=True)
            exec(code, self._names)

    def _commands(self, block: Block) -> None:
        for command in commands_of(block):
            if is_run(command):
                self._execute(block, command)
            else:
                next(look for pattern, _, look in NOT_RUN if re.search(pattern, command))(block, command)

    def _execute(self, block: Block, command: str) -> None:
        words = runnable(command)
        for _ in range(TRIES):
            run = subprocess.run(
                words, capture_output=True, text=True, cwd=self._folder, timeout=LIMIT, env=ENVIRONMENT, check=False
            )
            if run.returncode == 0 or ABORTED_AT_EXIT not in run.stderr:
                break
        assert run.returncode == 0, f"{block.place}: {command}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"

    def _script(self, block: Block) -> None:
        assert block.title, f"{block.place}: a script needs a title, which is its file's name"
        (self._folder / block.title).write_text(block.text)
        subprocess.run(["bash", "-n", block.title], cwd=self._folder, check=True)


# Ranks of several tests share the machine, and each would take all its cores.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ONEBIT_NUM_THREADS": "1"}


def runnable(command: str) -> list[str]:
    """The words of a command, with the programs of this Python's environment, and a port that nobody else has."""
    words = shlex.split(command)
    programs = {"torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"], "python": [sys.executable]}
    if words[0] == "mpiexec":
        words[:1] = [mpiexec() or "mpiexec", "--allow-run-as-root", "--oversubscribe"]
    return [part for word in words for part in programs.get(word, [word])]


def _both_sides_are_python(block: Block) -> None:
    for other in "-+":
        lines = [line[1:] for line in block.text.splitlines() if not line.startswith(other)]
        ast.parse(textwrap.dedent("\n".join(lines)))


def _shows_a_tested_file(block: Block) -> None:
    for name in SNIPPET.findall(block.text):
        _has_a_test(block, name)


def _has_a_test(block: Block, name: str) -> None:
    path = ROOT / name
    assert path.is_file(), f"{block.place}: {name} is not there"
    tests = (test.read_text() for test in (ROOT / "tests").rglob("*.py"))
    assert any(path.stem in test for test in tests), f"{block.place}: no test mentions {path.stem}"


def _makes_what_there_is(block: Block, command: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in shlex.split(command)[1:]:
        name, variable, _ = word.partition("=")
        pattern = rf"\$\({name}\)" if variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"{block.place}: the Makefile has no {name}"


def _installs_what_there_is(block: Block, command: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"\.\[(.+?)\]", command):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"{block.place}: there is no extra {extra}"


def _runs_a_tested_file(block: Block, command: str) -> None:
    for name in re.findall(r"\bexamples/[\w./]+\.py", command):
        _has_a_test(block, name)


def _runs_a_module(block: Block, command: str) -> None:
    for name in re.findall(r"-m onebit\.([\w.]+)", command):
        path = ROOT / name.replace(".", "/")
        assert (path / "__main__.py").is_file() or path.with_suffix(".py").is_file(), f"{block.place}: no {name}"


def has_mpi() -> bool:
    """Whether mpiexec can start ranks of this Python."""
    return mpiexec() is not None and find_spec("mpi4py") is not None


def _nothing(block: Block, command: str) -> None:
    """There is nothing to look at here."""


# Commands that are not run as they stand: a pattern, why not, what is looked at instead; the first that fits counts.
NOT_RUN: tuple[tuple[str, str, Callable[[Block, str], None]], ...] = (
    (r"^make\b", "minutes, or the network; the targets and their variables must exist", _makes_what_there_is),
    (r"^pip install\b", "would change the environment; the extras must exist", _installs_what_there_is),
    (r"-m onebit\.benchmarks", "minutes; test_commands.py runs a short form; the module must exist", _runs_a_module),
    (r"\bexamples/", "minutes, or packages that need not be here; has a test of its own", _runs_a_tested_file),
    (r"^(sbatch|srun)\b", "needs Slurm", _nothing),
    (r"--nnodes|--hostfile|-H ", "needs several machines", _nothing),
    (r"^tensorboard\b", "serves until it is stopped", _nothing),
    *(() if has_mpi() else ((r"^mpiexec\b", "there is no MPI here", _nothing),)),
)


def is_run(command: str) -> bool:
    """Whether a command is run as it stands."""
    return not any(re.search(pattern, command) for pattern, _, _ in NOT_RUN)


def commands() -> Iterator[tuple[Block, str]]:
    """Every command of every page."""
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "sh":
                for command in commands_of(block):
                    yield block, command
