"""What docs/migration.md shows is run as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

OPTIMIZERS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (OnebitAdam, {"freeze_step": 100}),
    (OnebitLamb, {"freeze_step": 100}),
    (ZeroOneAdam, {"var_freeze_step": 100}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda x: getattr(x, "__name__", None))
def test_moments_of_a_deepspeed_state_are_gone_on_from(kind: Callable[..., Any], options: dict[str, Any]) -> None:
    p = Parameter(torch.arange(10.0))
    optimizer = kind([p], lr=0.5, **options)
    moments = {"exp_avg": torch.linspace(-1, 1, 10), "exp_avg_sq": torch.linspace(1, 2, 10)}
    saved = {
        "state": {0: {"step": 57, **moments, "worker_error": torch.zeros(64), "server_error": torch.zeros(8)}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99), "freeze_step": 23, "params": [0]}],
    }
    exec(EXAMPLE, {"torch": torch, "saved": saved, "optimizer": optimizer})
    assert optimizer.param_groups[0]["step"] == 57
    assert optimizer.param_groups[0]["lr"] == 0.5
    for key, value in moments.items():
        assert torch.equal(optimizer.state[p][key], value)
    p.grad = torch.ones(10)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 58
    assert float(optimizer.state[p]["step"]) == 58
    assert float((p - torch.arange(10.0)).detach().abs().max()) > 0


def test_names_that_the_page_says_are_the_same_are_accepted() -> None:
    options = {
        name
        for row in re.findall(r"^\|(.*?)\| the same \|", PAGE, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    accepted = set()
    for kind, needed in OPTIMIZERS:
        accepted |= set(kind([Parameter(torch.zeros(1))], **needed).param_groups[0])
    adams = {"adamw_mode", "adam_w_mode", "fp32_optimizer_states", "capturable", "master_weights"}  # of the other two
    assert options - adams <= accepted
    assert len(options) > 15
