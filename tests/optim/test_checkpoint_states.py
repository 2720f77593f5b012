"""States with entries missing, added, reshaped or of another type: a documented error, and nothing has changed."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebit.comm import Backend, InputError, OnebitError, run_threads
from tests.optim.resumable import KINDS, advance, everything
from tests.optim.samples import all_params, through_a_file
from tests.optim.spoilt import changed

SAVED = {"OnebitAdam": 8, "OnebitAdam, auto": 9, "ZeroOneAdam": 11, "OnebitLamb": 8}


class States(dict[str, list[dict[str, Any]]]):
    """By kind, what two ranks have saved."""

    def __repr__(self) -> str:
        return "States()"  # Hypothesis prints arguments


@pytest.fixture(scope="module")
def states() -> States:

    def train(backend: Backend, kind: str) -> dict[str, Any]:
        optimizer = KINDS[kind].make(backend)
        advance(optimizer, backend.rank, 0, SAVED[kind])
        return through_a_file(optimizer.state_dict())

    return States((kind, run_threads(2, train, kind)) for kind in SAVED)


@settings(max_examples=200)
@given(data=st.data(), kind=st.sampled_from(sorted(SAVED)))
def test_a_changed_state_is_refused_with_nothing_changed_or_loaded_whole(
    data: st.DataObject, kind: str, states: States
) -> None:
    """Some changes make another good state, such as one with another learning rate; that must be usable."""
    spoilt = [changed(states[kind][0], data.draw), copy.deepcopy(states[kind][1])]

    def load(backend: Backend) -> None:
        optimizer = KINDS[kind].make(backend)
        advance(optimizer, backend.rank, 30, 32)
        before = everything(optimizer)
        try:
            optimizer.load_state_dict(spoilt[backend.rank])
        except InputError:
            assert backend.rank == 0
            assert everything(optimizer) == before
        advance(optimizer, backend.rank, 32, 33)

    with contextlib.suppress(OnebitError):  # ranks that hold different states find out at the next step
        run_threads(2, load)


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize(
    "state", [None, 3, [], {}, {"state": {}}, {"param_groups": []}, {"state": 1, "param_groups": 2}]
)
def test_what_is_no_state_is_refused(kind: str, state: Any) -> None:
    def load(backend: Backend) -> None:
        optimizer = KINDS[kind].make(backend)
        advance(optimizer, 0, 0, 2)
        before = everything(optimizer)
        with pytest.raises(InputError, match=f"{type(optimizer).__name__}: "):
            optimizer.load_state_dict(state)
        assert everything(optimizer) == before

    run_threads(1, load)


def test_messages_say_what_was_expected_and_what_came(states: States) -> None:
    def altered(kind: str, *path: Any, to: Any) -> dict[str, Any]:
        state = copy.deepcopy(states[kind][0])
        above = state
        for key in path[:-1]:
            above = above[key]
        if to is KeyError:
            del above[path[-1]]
        else:
            above[path[-1]] = to
        return state

    cases = [
        ("OnebitAdam", altered("OnebitAdam", "state", 3, "exp_avg", to=KeyError), "of parameter 3 lacks exp_avg"),
        (
            "OnebitAdam",
            altered("OnebitAdam", "state", 0, "exp_avg_sq", to=torch.zeros(7, 5)),
            r"parameter 0 has exp_avg_sq float32 \(7, 5\), expected floating point numbers of shape \(5, 7\)",
        ),
        (
            "OnebitAdam",
            altered("OnebitAdam", "state", 0, "worker_error", to=torch.zeros(9)),
            "is one of DeepSpeed.s 1-bit optimizers .* docs/migration.md has from_deepspeed",
        ),
        ("OnebitAdam", altered("OnebitAdam", "state", 0, "step", to=5), "has step 5, expected a tensor of one number"),
        ("OnebitAdam", altered("OnebitAdam", "state", 77, to={}), r"has entries \[77\], which are of no parameter"),
        (
            "OnebitAdam",
            altered("OnebitAdam", "param_groups", 0, "params", to=[0, 1, 2]),
            r"have \[3, 3\] parameters, expected \[4, 3\]",
        ),
        ("OnebitAdam", altered("OnebitAdam", "param_groups", 1, "lr", to=-1.0), r"lr must be a number in \[0, inf\)"),
        (
            "OnebitAdam",
            altered("OnebitAdam", "param_groups", 1, "step", to=1.5),
            "group 1 .* has step=1.5, expected an int",
        ),
        ("OnebitAdam", altered("OnebitAdam", "onebit", "residuals", to=[]), "error feedback for 2 groups"),
        ("OnebitAdam", altered("OnebitAdam", "onebit", "skipped_steps", to=KeyError), "lacks, or has more than"),
        (
            "OnebitAdam",
            altered("OnebitAdam", "onebit", "residuals", 0, to=states["OnebitAdam"][0]["onebit"]["residuals"][1]),
            r"feedback to load for group 0 is of tensors with \[1, 120, 54\] elements",
        ),
        (
            "OnebitAdam",
            altered("OnebitAdam", "state", 0, "exp_inf", to=torch.zeros(5, 7)),
            "has exp_inf, of which OnebitAdam knows nothing",
        ),
        (
            "ZeroOneAdam",
            altered("ZeroOneAdam", "state", 0, "interval_mean", to=KeyError),
            "parameter 0 lacks interval_mean",
        ),
        (
            "ZeroOneAdam",
            altered("ZeroOneAdam", "state", 0, "interval_rate", to=math.inf),
            "has interval_rate inf, expected a finite float",
        ),
        (
            "ZeroOneAdam",
            altered(
                "ZeroOneAdam",
                "state",
                0,
                to={k: v for k, v in states["ZeroOneAdam"][0]["state"][0].items() if "interval" not in k},
            ),
            "some parameters are between synchronisations and others are not",
        ),
        ("OnebitLamb", altered("OnebitLamb", "state", 0, "coeff_mean", to=KeyError), "parameter 0 lacks coeff_mean"),
        (
            "OnebitAdam, auto",
            altered("OnebitAdam, auto", "param_groups", 0, "freeze_history", to=(1.0, 2)),
            "freeze_history of another form",
        ),
    ]

    def load(backend: Backend) -> None:
        for kind, state, message in cases:
            optimizer = KINDS[kind].make(backend)
            before = everything(optimizer)
            with pytest.raises(InputError, match=message):
                optimizer.load_state_dict(state)
            assert everything(optimizer) == before

    run_threads(1, load)


@pytest.mark.parametrize("kind", ["OnebitAdam", "ZeroOneAdam"])
@pytest.mark.parametrize("torchs", [torch.optim.Adam, torch.optim.AdamW])
def test_the_kind_of_weight_decay_goes_on_as_torchs_adam_had_it(kind: str, torchs: type[torch.optim.Optimizer]) -> None:
    def load(backend: Backend) -> None:
        optimizer = KINDS[kind].make(backend)
        params = all_params(optimizer)
        saved = torchs([{"params": params[:4]}, {"params": params[4:]}], weight_decay=0.1).state_dict()
        told = {group.get("decoupled_weight_decay") for group in saved["param_groups"]}
        if told == {None}:
            pytest.skip("this torch's states do not tell")
        optimizer.load_state_dict(through_a_file(saved))
        modes = [group["adamw_mode"] for group in optimizer.param_groups]
        assert modes == [torchs is torch.optim.AdamW] * 2
        own = through_a_file(optimizer.state_dict())
        own["param_groups"][0]["adamw_mode"] = not modes[0]  # what is saved here is told by its own name
        optimizer.load_state_dict(own)
        assert [group["adamw_mode"] for group in optimizer.param_groups] == [not modes[0], modes[1]]
        before = everything(optimizer)
        saved["param_groups"][1]["decoupled_weight_decay"] = "yes"
        with pytest.raises(InputError, match="adamw_mode"):
            optimizer.load_state_dict(saved)
        assert everything(optimizer) == before

    run_threads(1, load)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"capturable": False}], ids=str)
def test_states_of_torchs_adamw_are_taken_with_the_options_it_was_made_with(options: dict[str, Any]) -> None:
    def load(backend: Backend) -> None:
        optimizer = KINDS["OnebitAdam"].make(backend)
        params = all_params(optimizer)
        torchs = torch.optim.AdamW([{"params": params[:4]}, {"params": params[4:]}], lr=0.5, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        torchs.step()
        optimizer.load_state_dict(through_a_file(torchs.state_dict()))
        assert [group["step"] for group in optimizer.param_groups] == [1, 1]
        assert optimizer.param_groups[0]["lr"] == 0.5
        advance(optimizer, backend.rank, 1, 6)

    run_threads(2, load)
