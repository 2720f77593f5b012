"""What a process dropped is not freed by processes forked from it, where objects of CUDA's would end them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import gc, os, sys
from onebit.compress.forks import guard_forks

class Dropped:
    def __init__(self): self.me = self
    def __del__(self): os.write(1, b"freed by " + who)

who = b"the child"
gc.collect()
gc.disable()
if sys.argv[1] == "guarded":
    guard_forks()
    guard_forks()
Dropped()
child = os.fork()
if child == 0:
    gc.collect()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
who = b"the parent"
gc.collect()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.parametrize(
    ("kind", "said"), [("guarded", "freed by the parent"), ("unguarded", "freed by the childfreed by the parent")]
)
def test_only_the_parent_frees_what_it_dropped(kind: str, said: str) -> None:
    made = subprocess.run([sys.executable, "-c", SCRIPT, kind], capture_output=True, text=True, check=True, timeout=60)
    assert made.stdout == said
