"""The documentation's site is built without a warning, and its reference has every public name."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

needs_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs MkDocs, as in onebit[docs]")
PACKAGES = ("comm", "compress", "optim")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr, run.stderr
    return folder


@needs_mkdocs
def test_every_page_is_there_and_none_shows_markdown_that_was_not_understood(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        built = site / ("" if name.name == "index" else name) / "index.html"
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", built.read_text(), flags=re.DOTALL)
        article = text[text.index("<article") : text.index("</article>")]
        left_over = re.search(r"```|--8<--|\n:::|<p>[-|] |\]\(|\n- \S", article)
        assert left_over is None, f"{page}: {article[left_over.start() - 60 : left_over.end() + 60]}"


@needs_mkdocs
@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name_with_its_description(package: str, site: Path) -> None:
    html = (site / "api" / package / "index.html").read_text()
    for name in importlib.import_module(f"onebit.{package}").__all__:
        assert f'id="onebit.{package}.{name}"' in html, f"docs/api/{package}.md: add ::: onebit.{package}.{name}"


@needs_mkdocs
def test_the_site_asks_no_other_host_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r'<(?:link|script|img)[^>]+(?:href|src)="(?:https?:)?//', page.read_text()), page


def test_the_makefile_builds_it_in_the_same_way() -> None:
    assert re.search(r"^docs: setup.*\n\t.*mkdocs build --strict$", (ROOT / "Makefile").read_text(), re.MULTILINE)
