"""The examples of client libraries train on two ranks over Gloo, and the mistakes made with them name their mend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.examples.client_runs import CLIENTS, SCRIPTS, reported, torchrun

STEPS = 256  # two epochs of 8,192 points by two ranks in batches of 32

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_trains_two_equal_ranks_on_few_bytes(name: str, tmp_path: Path) -> None:
    found = reported(torchrun(CLIENTS / name, cwd=tmp_path))
    assert (found["steps"], found["ranks"], found["phase"]) == (STEPS, 2, "compressed")
    assert found["accuracy"] > 0.75  # chance is 0.125; AdamW comes to 0.82
    # 60 of 256 steps are dense, and all others send about a thirtieth
    assert 60 / STEPS < found["share"] < 60 / STEPS + 1 / 28


def test_one_rank_trains_by_the_same_script_and_sends_nothing(tmp_path: Path) -> None:
    found = reported(torchrun(CLIENTS / "huggingface_trainer.py", ranks=1, cwd=tmp_path))
    assert (found["ranks"], found["share"]) == (1, 0)


def test_a_resumed_trainer_goes_on_bit_for_bit_with_the_error_feedback_of_every_rank(tmp_path: Path) -> None:
    output = torchrun(Path(__file__).with_name("trainer_resume.py"), tmp_path, cwd=tmp_path)
    for rank in range(2):
        assert (tmp_path / f"{rank}.pt").exists(), output[-6000:]
        whole, resumed = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)), f"rank {rank}"


def test_fine_tuning_reports_both_optimizers_and_leaves_a_document(tmp_path: Path) -> None:
    short = ["--train", 6, "--held-out", 4, "--batch", 3, "--seeds", 1, "--output", tmp_path]
    output = torchrun(CLIENTS / "finetune_minilm.py", *short, cwd=tmp_path)
    documents = [*tmp_path.glob("*.json")]
    assert len(documents) == 1, output[-6000:]
    rows = {row["optimizer"]: row for row in json.loads(documents[0].read_text())["rows"]}
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
    "Trainer that clips": r"set TrainingArguments\(max_grad_norm=0\)",
    "Lightning without attach": r"call onebit\.comm\.ddp\.attach\(model, optimizer\)",
    "Lightning, attached before it wraps": "where .* Lightning wraps the model, call it once they have",
}


def test_every_mistake_of_a_newcomer_names_its_mend_on_every_rank(tmp_path: Path) -> None:
    output = torchrun(Path(__file__).with_name("client_mistakes.py"), tmp_path, cwd=tmp_path)
    for rank in range(2):
        assert (tmp_path / f"{rank}.json").exists(), output[-6000:]
        messages = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {*messages} == {*MENDS}
        for name, mend in MENDS.items():
            assert re.search(mend, messages[name]), f"rank {rank}, {name}: {messages[name]}"
