"""The examples of client libraries train on CUDA devices over NCCL, where these libraries are installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.examples.client_runs import CLIENTS, SCRIPTS, reported, torchrun

RANKS = min(2, max(1, torch.cuda.device_count()))


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_trains_over_nccl(name: str, tmp_path: Path) -> None:
    output = torchrun(CLIENTS / name, ranks=RANKS, cwd=tmp_path, variables={})
    found = reported(output)
    assert (found["ranks"], found["phase"]) == (RANKS, "compressed"), output[-2000:]
    assert found["accuracy"] > 0.75, output[-2000:]  # chance is 0.125; AdamW comes to 0.82
    assert RANKS == 1 or found["share"] < 0.3, output[-2000:]  # 60 of 256 steps are dense
