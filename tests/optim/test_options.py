"""Options of OnebitLamb and ZeroOneAdam that are out of range or unknown are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from onebit.comm import InputError
from onebit.optim import OnebitLamb
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
