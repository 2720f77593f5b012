"""Options out of range, tensors that cannot be averaged, ranks that differ: one clear error each, nothing changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, BackendError, InputError, MismatchError, broadcast, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from tests.comm.disagreements import counted
from tests.comm.samples import bits
from tests.optim.samples import all_params, contents, gradients, parameters, step, values

OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({"freeze_step": bad}, r"freeze_step must be an int of at least 1") for bad in (0, -1, 1.0, True, "auto!", None)),
    *(({"lr": bad}, r"lr must be a number in \[0, inf\)") for bad in (-1e-3, math.nan, math.inf, "1", None, True)),
    ({"lr": torch.ones(2)}, r"lr must be a number or a tensor with one element"),
    ({"lr": torch.tensor(-1.0)}, r"lr must be a number in \[0, inf\)"),
    *(({"betas": bad}, r"betas must be two numbers") for bad in (0.9, (0.9,), (0.9, 0.99, 0.999), None)),
    *(({"betas": (bad, 0.9)}, r"betas\[0\] must be a number in \[0, 1\)") for bad in (-0.1, 1.0, math.nan, None)),
    *(({"betas": (0.9, bad)}, r"betas\[1\] must be a number in \[0, 1\)") for bad in (-0.1, 1.0, math.nan, None)),
    *(({"eps": bad}, r"eps must be a number in \[0, inf\)") for bad in (-1e-8, math.nan, math.inf, None)),
    *(
        ({"weight_decay": bad}, r"weight_decay must be a number in \[0, inf\)")
        for bad in (-1.0, math.nan, math.inf, None)
    ),
    *(({"bucket_mb": bad}, r"bucket_mb must be a positive number of MiB") for bad in (0, -1, math.inf, math.nan, True)),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_an_option_out_of_range_is_refused_when_the_optimizer_is_made_and_named_with_its_value(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"{message}.*got ") as told:
        OnebitAdam(parameters(), **{"freeze_step": 3, **options})
    value = next(iter(options.values()))
    if not isinstance(value, (torch.Tensor, tuple)):
        assert repr(value) in str(told.value)


def test_freeze_step_has_no_default_for_there_is_no_good_one() -> None:
    with pytest.raises(TypeError, match="freeze_step"):
        OnebitAdam(parameters())  # type: ignore[call-arg]


def test_an_unknown_backend_is_refused_when_the_optimizer_is_made() -> None:
    with pytest.raises(BackendError, match=r"no backend is named 'carrier pigeon'; there are .*'gloo'"):
        OnebitAdam(parameters(), freeze_step=3, backend="carrier pigeon")


PARAMETERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False), r"got int32 \(3,\)"),
    (lambda: Parameter(torch.ones(3).double()), r"got float64 \(3,\)"),
    (lambda: Parameter(torch.ones(2, dtype=torch.complex64)), r"got complex64 \(2,\); leave it out"),
    (lambda: Parameter(torch.eye(3).to_sparse()), r"got float32 \(3, 3\) with layout torch.sparse_coo"),
]


@pytest.mark.parametrize(("make", "message"), PARAMETERS, ids=[message for _, message in PARAMETERS])
def test_a_parameter_that_cannot_be_averaged_is_refused_and_named(make: Callable[[], Any], message: str) -> None:
    expected = f"OnebitAdam: parameter 1 must be dense float32, bfloat16 or float16, {message}"
    with pytest.raises(InputError, match=expected):
        OnebitAdam([Parameter(torch.ones(2)), make()], freeze_step=3)
    optimizer = OnebitAdam(parameters(), freeze_step=3)
    with pytest.raises(InputError, match=expected):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2)), make()]})
    assert len(optimizer.param_groups) == 1


def test_a_group_with_an_option_out_of_range_is_not_added() -> None:
    def train(backend: Backend) -> None:
        optimizer = OnebitAdam(parameters(), freeze_step=3, backend=backend)
        with pytest.raises(InputError, match="freeze_step must be an int of at least 1"):
            optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "freeze_step": 0})
        assert len(optimizer.param_groups) == 1
        step(optimizer, gradients(parameters(), backend.rank, 0))

    run_threads(2, train)


@pytest.mark.parametrize("everywhere", [True, False], ids=["on all ranks", "on one rank"])
def test_a_sparse_gradient_at_the_first_step_is_refused_on_all_ranks(everywhere: bool) -> None:
    def train(backend: Backend) -> None:
        params = [Parameter(torch.ones(3)), Parameter(torch.ones(4, 2))]
        optimizer = OnebitAdam(params, freeze_step=1, backend=backend)
        guilty = everywhere or backend.rank == 1
        params[1].grad = torch.eye(4, 2).to_sparse() if guilty else torch.eye(4, 2)
        message = r"the gradient of parameter 1, float32 \(4, 2\), is sparse; use dense gradients \(sparse=False"
        with counted(backend) as moved:
            for _ in range(2):
                with pytest.raises(InputError if guilty else MismatchError, match=message):
                    optimizer.step()
        assert moved == []
        assert all(bool((p == 1).all()) for p in params)
        assert not optimizer.state
        step(optimizer, [torch.ones(3), torch.eye(4, 2)])

    run_threads(2, train)


def test_a_sparse_gradient_later_is_refused_and_nothing_changes() -> None:
    def train(backend: Backend) -> None:
        params = [Parameter(torch.ones(4, 2))]
        optimizer = OnebitAdam(params, freeze_step=1, backend=backend)
        for number in range(3):
            step(optimizer, gradients(params, backend.rank, number))
            before = contents(optimizer)
            params[0].grad = torch.eye(4, 2).to_sparse()
            with pytest.raises(InputError, match="is sparse"):
                optimizer.step()
            assert contents(optimizer) == before

    run_threads(2, train)


# --- ranks that differ; the last one is the odd one out

DIFFERENT: dict[str, tuple[Callable[[bool], OnebitAdam], str]] = {}


def differs(fact: str) -> Callable[[Callable[[bool], OnebitAdam]], None]:
    """Register how to make an optimizer that differs on one rank, and what must be named."""

    def register(make: Callable[[bool], OnebitAdam]) -> None:
        DIFFERENT[fact] = (make, fact)

    return register


def option(**options: Any) -> Callable[[bool], OnebitAdam]:
    return lambda odd: OnebitAdam(parameters(), **{"freeze_step": 3, **(options if odd else {})})


differs("option lr of group 0: ranks 0, 1: 0.001; rank 2: 0.5")(option(lr=0.5))
differs("option lr of group 0: ranks 0, 1: 0.001; rank 2: 0.25")(option(lr=torch.tensor(0.25)))
differs("option betas of group 0: ranks 0, 1: (0.9, 0.999); rank 2: (0.9, 0.99)")(option(betas=(0.9, 0.99)))
differs("option eps of group 0: ranks 0, 1: 1e-08; rank 2: 1e-07")(option(eps=1e-7))
differs("option weight_decay of group 0: ranks 0, 1: 0.01; rank 2: 0.0")(option(weight_decay=0.0))
differs("option freeze_step of group 0: ranks 0, 1: 3; rank 2: 4")(option(freeze_step=4))
differs("option adamw_mode of group 0: ranks 0, 1: True; rank 2: False")(option(adamw_mode=False))
differs("option bias_correction of group 0: ranks 0, 1: True; rank 2: False")(option(bias_correction=False))
differs("option maximize of group 0: ranks 0, 1: False; rank 2: True")(option(maximize=True))
differs("bucket_mb: ranks 0, 1: 16.0; rank 2: 8.0")(option(bucket_mb=8))
differs("the codec: ranks 0, 1: SignCodec(block_size=1024")(option(codec=SignCodec(block_size=64)))


@differs("the number of parameters of group 0: ranks 0, 1: 7; rank 2: 6")
def _number(odd: bool) -> OnebitAdam:
    return OnebitAdam(parameters()[odd:], freeze_step=3)


@differs("the number of parameters of group 1: ranks 0, 1: none; rank 2: 1")
def _groups(odd: bool) -> OnebitAdam:
    optimizer = OnebitAdam(parameters(), freeze_step=3)
    if odd:
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))]})
    return optimizer


@differs("parameter 3 of group 0: ranks 0, 1: float32 (131,); rank 2: float32 (132,)")
def _shape(odd: bool) -> OnebitAdam:
    params = parameters()
    if odd:
        params[3] = Parameter(torch.ones(132))
    return OnebitAdam(params, freeze_step=3)


@differs("parameter 5 of group 0: ranks 0, 1: float32 (2, 3, 4, 5); rank 2: bfloat16 (2, 3, 4, 5)")
def _dtype(odd: bool) -> OnebitAdam:
    params = parameters()
    if odd:
        params[5] = Parameter(params[5].detach().bfloat16())
    return OnebitAdam(params, freeze_step=3)


@differs("the values of parameter 6 of group 0 (onebit.comm.broadcast makes them equal): ranks 0, 1: checksum")
def _values(odd: bool) -> OnebitAdam:
    params = parameters()
    if odd:
        with torch.no_grad():
            params[6][2, 3] += 1e-6
    return OnebitAdam(params, freeze_step=3)


@differs("option step of group 0: ranks 0, 1: 0; rank 2: 2")
def _step(odd: bool) -> OnebitAdam:
    optimizer = OnebitAdam(parameters(), freeze_step=3)
    if odd:  # as if only one rank had found its checkpoint
        alone = OnebitAdam(parameters(), freeze_step=3, backend="single")
        for number in range(2):
            step(alone, gradients(parameters(), 0, number))
        optimizer.load_state_dict(alone.state_dict())
    return optimizer


@pytest.mark.parametrize("fact", DIFFERENT)
def test_ranks_that_differ_are_all_told_the_first_difference_and_nothing_changes(fact: str) -> None:
    make, expected = DIFFERENT[fact]

    def train(backend: Backend) -> None:
        optimizer = make(backend.rank == 2)
        before = contents(optimizer)
        given = [torch.zeros_like(p) for p in all_params(optimizer)]
        for _ in range(2):  # a second try is no way around
            with counted(backend) as moved, pytest.raises(MismatchError) as told:
                step(optimizer, given)
            assert moved == []
            message = str(told.value)
            assert message.startswith(f"rank {backend.rank}: OnebitAdam.step: ranks do not agree on {expected}")
            assert "; rank 2: " in message
            assert contents(optimizer) == before
            assert optimizer.stats.calls == 0

    run_threads(3, train)


def test_after_broadcast_ranks_with_different_starts_train_together() -> None:
    def train(backend: Backend) -> list[bytes]:
        params = [Parameter(values(backend.rank, shape=(50,))), Parameter(values(1, backend.rank, shape=()))]
        optimizer = OnebitAdam(params, freeze_step=2, backend=backend)
        with pytest.raises(
            MismatchError, match=r"values of parameter 0 of group 0 \(onebit\.comm\.broadcast makes them equal"
        ):
            step(optimizer, gradients(params, backend.rank, 0))
        broadcast(params, backend)
        for number in range(4):
            step(optimizer, gradients(params, backend.rank, number))
        return bits(params)

    first, *others = run_threads(3, train)
    assert all(seen == first for seen in others)


def test_groups_that_differ_are_told_when_they_are_added_in_the_middle_of_training() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=1, backend=backend)
        for number in range(3):
            step(optimizer, gradients(params, backend.rank, number))
        optimizer.add_param_group({"params": [Parameter(torch.ones(4 + backend.rank))]})
        before = contents(optimizer)
        with pytest.raises(MismatchError, match=r"parameter 0 of group 1: rank 0: float32 \(4,\); rank 1: fl"):
            optimizer.step()
        assert contents(optimizer) == before

    run_threads(2, train)


def test_agreement_is_asked_for_once_and_not_at_every_step() -> None:
    def train(backend: Backend) -> list[int]:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=2, backend=backend)
        collectives = []
        for number in range(6):
            backend.traffic.reset()
            step(optimizer, gradients(params, backend.rank, number))
            collectives.append(backend.traffic.collectives)
        return collectives

    # One comparison of everything, one when each of the two averages is made, and two collectives a step.
    assert run_threads(2, train) == [[4, 2, 3, 2, 2, 2]] * 2
