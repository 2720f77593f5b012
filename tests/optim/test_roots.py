"""The first square root of a process on the CPU is taken by one thread; shared by two it is now and then wrong."""

from __future__ import annotations

import subprocess
import sys

IMPORT = """
import torch

taken = []
root = torch.sqrt
torch.sqrt = lambda x: taken.append((x.numel(), x.dtype, x.device.type)) or root(x)
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
import onebit.optim
assert taken == [(1, torch.float32, "cpu")], taken
"""


def test_importing_the_optimizers_takes_a_root_of_one_number() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], check=True, timeout=120)
