"""A process that destroys its group and ends leaves no thread of Gloo's behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# What is registered with atexit first is called last: the check comes after the library has let go.
SCRIPT = """
import atexit, sys, weakref
import torch
import torch.distributed as dist

def check():
    print("held" if group() is not None else "let go")

atexit.register(check)

from onebit.comm import compressed_allreduce, make_backend

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
backend = make_backend("gloo")
backend.all_reduce(torch.ones(4)).wait()
if "destroyed" in sys.argv:
    dist.destroy_process_group()
"""


def _end_of(tmp_path: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout.strip()


def test_a_destroyed_group_is_let_go_before_the_interpreter_ends(tmp_path: Path) -> None:
    assert _end_of(tmp_path, "destroyed") == "let go"


def test_a_group_that_torch_still_holds_is_left_alone(tmp_path: Path) -> None:
    assert _end_of(tmp_path) == "held"
