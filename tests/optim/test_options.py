"""Options of OnebitLamb and ZeroOneAdam that are out of range or unknown are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import InputError
from onebit.optim import OnebitLamb, ZeroOneAdam
from tests.optim.samples import parameters

BAD: list[tuple[dict[str, Any], str]] = [
    ({"eps": 0.0}, "eps must be more than 0"),
    ({"max_coeff": -1.0}, "max_coeff must be a number of at least 0"),
    ({"min_coeff": 0.5, "max_coeff": 0.3}, r"min_coeff=0\.5 must be at most max_coeff=0\.3"),
    ({"factor_min": 5.0}, r"factor_min=5\.0 must be at most factor_max=1\.0"),
    ({"coeff_beta": 1.0}, "coeff_beta must be less than 1"),
    ({"factor_threshold": 1.5}, "factor_threshold must be less than 1"),
    ({"factor_max": math.nan}, "factor_max must be a number of at least 0"),
    ({"freeze_step": 0}, "freeze_step must be"),
    ({"amsgrad": True}, "amsgrad=True is not supported"),
    ({"max_grad_norm": 1.0}, "clip_grad_norm_"),
    ({"trust": 1.0}, "there is no option 'trust'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnebitLamb(parameters(), **{"freeze_step": 5, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"var_freeze_step": 0}, "var_freeze_step must be an int of at least 1, got 0"),
        ({"local_step_clipper": 1.5}, "local_step_clipper must be an int of at least 1, got 1.5"),
        ({"lr": -1.0}, "lr must be"),
        ({"adamw_mode": 1}, "adamw_mode must be True or False"),
        ({"amsgrad": True}, "amsgrad=True is not supported"),
        ({"freeze_step": 10}, "there is no option 'freeze_step'"),
    ],
)
def test_options_out_of_range_or_unknown_are_refused_with_their_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"ZeroOneAdam: {message}"):
        ZeroOneAdam(parameters(), **{"var_freeze_step": 5, **options})
    optimizer = ZeroOneAdam(parameters(), var_freeze_step=5)
    if "freeze_step" not in options:  # in a group a name that nobody knows is somebody else's
        with pytest.raises(InputError, match=message):
            optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], **options})
        assert len(optimizer.param_groups) == 1
