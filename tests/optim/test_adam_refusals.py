"""What CPUAdam cannot do it refuses before anything has changed, and says what to do instead."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.compress import InputError
from onebit.optim import CPUAdam
from tests.optim.samples import parameters, values

BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lr": math.nan}, "lr must be a number"),
    ({"lr": -1.0}, "lr must be a number"),
    ({"lr": torch.tensor(math.nan)}, "lr must be a number"),
    ({"lr": torch.tensor([0.1, 0.2])}, "one element"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
    ({"betas": (0.9, math.nan)}, r"betas\[1\]"),
    ({"betas": 0.9}, "betas must be two numbers"),
    ({"eps": -1e-8}, "eps"),
    ({"weight_decay": math.inf}, "weight_decay"),
    ({"amsgrad": True}, "amsgrad=True is refused: .*torch.optim.AdamW"),
    ({"foreach": True}, "foreach=True is refused"),
    ({"fused": True}, "fused=True is refused"),
    ({"capturable": True}, "capturable=True is refused"),
    ({"differentiable": True}, "differentiable=True is refused"),
    ({"exp_avg_dtype": torch.float16}, "exp_avg_dtype must be"),
    ({"exp_avg_sq_dtype": torch.float64}, "exp_avg_sq_dtype must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda x: str(x))
def test_an_option_that_cannot_be_used_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CPUAdam(parameters(), **options)


def test_torchs_options_may_be_given_if_they_are_off() -> None:
    CPUAdam(parameters(), amsgrad=False, foreach=None, fused=False, differentiable=False, capturable=False)


def test_an_option_that_nobody_has_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no option 'momentum'"):
        CPUAdam(parameters(), momentum=0.9)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), "float64 .*must be float32, bfloat16 or float16"),
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, device="meta"), "must be on a cpu device"),
        (torch.zeros(1).expand(3), "share memory"),
        (torch.zeros(3, 3).to_sparse(), "is sparse"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_parameter_that_cannot_be_updated_is_refused_and_not_added(p: Tensor, message: str) -> None:
    optimizer = CPUAdam(parameters())
    with pytest.raises(InputError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2)), Parameter(p)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_a_group_is_refused() -> None:
    p = Parameter(torch.zeros(3))
    with pytest.raises(InputError, match="twice"):
        CPUAdam([p, p])


def test_moments_in_fp16_are_refused() -> None:
    with pytest.raises(InputError, match="in float16, which is too coarse"):
        CPUAdam(parameters(dtype=torch.float16), fp32_optimizer_states=False)


def fp64_gradient(p: Parameter, optimizer: CPUAdam) -> None:
    p.grad.data = p.grad.double()  # type: ignore[union-attr]


def integer_gradient(p: Parameter, optimizer: CPUAdam) -> None:
    p.grad.data = p.grad.int()  # type: ignore[union-attr]


def sparse_gradient(p: Parameter, optimizer: CPUAdam) -> None:
    p.grad = p.grad.to_sparse()  # type: ignore[union-attr]


def fp64_parameter(p: Parameter, optimizer: CPUAdam) -> None:
    p.data = p.data.double()


def rate_not_a_number(p: Parameter, optimizer: CPUAdam) -> None:
    optimizer.param_groups[0]["lr"] = math.nan


def shorter_moment(p: Parameter, optimizer: CPUAdam) -> None:
    optimizer.state[p]["exp_avg"] = torch.zeros(3)


def fp64_moment(p: Parameter, optimizer: CPUAdam) -> None:
    optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].double()


def fp64_step(p: Parameter, optimizer: CPUAdam) -> None:
    optimizer.state[p]["step"] = optimizer.state[p]["step"].double()


STEP_ERRORS = {
    fp64_gradient: r"gradient of parameter 3, float64 \(131,\), must be float32",
    integer_gradient: "gradient of parameter 3, int32",
    sparse_gradient: "gradient of parameter 3.*is sparse",
    fp64_parameter: "parameter 3, float64",
    rate_not_a_number: "lr must be a number",
    shorter_moment: r"exp_avg of a parameter float32 \(131,\) must be .* of shape \(131,\) .*got float32 \(3,\)",
    fp64_moment: "exp_avg_sq of a parameter",
    fp64_step: "step of a parameter",
}


@pytest.mark.parametrize("spoil", STEP_ERRORS, ids=lambda x: x.__name__)
def test_a_step_that_cannot_be_made_changes_nothing(spoil: Callable[[Parameter, CPUAdam], None]) -> None:
    params = parameters()
    optimizer = CPUAdam(params)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = values(3, i, step, shape=tuple(p.shape))
        if step < 2:
            optimizer.step()
    spoil(params[3], optimizer)
    before = copy.deepcopy([(p.data, dict(optimizer.state[p])) for p in params])
    with pytest.raises(InputError, match=STEP_ERRORS[spoil]):
        optimizer.step()
    for p, (value, state) in zip(params, before, strict=True):
        assert torch.equal(p, value)
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in state)


def test_an_error_names_the_parameter_if_it_has_a_name() -> None:
    named = [("encoder.weight", Parameter(torch.zeros(2))), ("head.bias", Parameter(torch.zeros(3)))]
    optimizer = CPUAdam(named)
    named[1][1].grad = torch.ones(3).to_sparse()
    with pytest.raises(InputError, match=re.escape("parameter 1 (head.bias)")):
        optimizer.step()


def test_copies_that_cannot_be_kept_are_refused_and_the_old_ones_stay() -> None:
    params = parameters()
    matrix, image = params[0], params[5]
    optimizer = CPUAdam(params)
    kept = torch.empty_like(matrix, dtype=torch.bfloat16, requires_grad=False)
    optimizer.keep_copies({matrix: kept})
    bad: list[tuple[Tensor, Tensor, str]] = [
        (
            Parameter(torch.zeros(2)),
            torch.zeros(2, dtype=torch.bfloat16),
            "must be a dense float32 parameter of this optimizer",
        ),
        (matrix, torch.zeros(5, 7), "must be a bfloat16 or float16 tensor"),
        (matrix, torch.zeros(7, 5, dtype=torch.bfloat16), "got bfloat16"),
        (matrix, torch.zeros(5, 7, dtype=torch.bfloat16, device="meta"), "on meta"),
        (image, torch.zeros(image.shape, dtype=torch.bfloat16), "strides"),
    ]
    for p, copy_, message in bad:
        with pytest.raises(InputError, match=message):
            optimizer.keep_copies({p: copy_})
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert torch.equal(kept, matrix.bfloat16())
