"""A run saved at any step, in any phase, and loaded goes on bit for bit on every rank, error feedback included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, InputError, MismatchError, Residual, run_threads
from onebit.optim import OnebitAdam
from tests.comm.samples import bits, state_bits
from tests.optim.samples import contents, feedback, gradients, parameters, patchy, step, through_a_file

STEPS = 9


def make(backend: Backend, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[OnebitAdam, list[Parameter]]:
    """Two groups whose phases change at steps 2 and 5."""
    params = parameters(dtype=dtype)
    groups = [{"params": params[:4], "freeze_step": 2, "lr": 1e-2}, {"params": params[4:], "freeze_step": 5}]
    return OnebitAdam(groups, freeze_step=99, backend=backend, **options), params


def saved(optimizer: OnebitAdam, params: list[Parameter], scheduler: Any) -> dict[str, Any]:
    return through_a_file(
        {
            "params": [p.detach() for p in params],
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
    )


def loaded(backend: Backend, checkpoint: Mapping[str, Any], optimizer: OnebitAdam, params: list[Parameter]) -> Any:
    checkpoint = through_a_file(checkpoint)  # a state once loaded shares its tensors, as with torch's own optimizers
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with torch.no_grad():
        for p, value in zip(params, checkpoint["params"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    return scheduler


@pytest.mark.parametrize(
    ("world_size", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (2, torch.float16), (3, torch.float32)], ids=str
)
def test_a_run_resumed_after_any_step_is_bit_equal_to_one_without_a_break(world_size: int, dtype: torch.dtype) -> None:
    def train(backend: Backend) -> None:
        optimizer, params = make(backend, dtype)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        checkpoints = [saved(optimizer, params, scheduler)]
        expected = []
        for number in range(STEPS):
            step(optimizer, patchy(params, backend.rank, number))
            scheduler.step()
            checkpoints.append(saved(optimizer, params, scheduler))
            expected.append((contents(optimizer), feedback(optimizer)))
        used, used_params = make(backend, dtype)  # has made steps of another run before each load
        for start in range(STEPS):
            fresh, fresh_params = make(backend, dtype)
            step(used, patchy(used_params, backend.rank, 70 + start))
            for resumed, own in ((fresh, fresh_params), (used, used_params)):
                schedule = loaded(backend, checkpoints[start], resumed, own)
                assert state_bits(resumed.state_dict()) == state_bits(checkpoints[start]["optimizer"])
                for number in range(start, STEPS):
                    step(resumed, patchy(own, backend.rank, number))
                    schedule.step()
                    assert (contents(resumed), feedback(resumed)) == expected[number]

    run_threads(world_size, train)


def test_saving_changes_nothing() -> None:
    def train(backend: Backend, save: bool) -> list[Any]:
        optimizer, params = make(backend)
        for number in range(STEPS):
            if save:
                optimizer.state_dict()
            step(optimizer, gradients(params, backend.rank, number))
        return [contents(optimizer), feedback(optimizer)]

    assert run_threads(2, train, True) == run_threads(2, train, False)


def test_error_feedback_is_part_of_a_checkpoint_and_matters() -> None:
    def train(backend: Backend, forget: bool) -> list[bytes]:
        optimizer, params = make(backend)
        for number in range(6):
            step(optimizer, gradients(params, backend.rank, number))
        state = through_a_file(optimizer.state_dict())
        if forget:
            for residual in state["onebit"]["residuals"]:
                residual["worker"].zero_()
        optimizer.load_state_dict(state)
        step(optimizer, gradients(params, backend.rank, 6))
        return bits(params)

    assert run_threads(2, train, True) != run_threads(2, train, False)


def test_loaded_error_feedback_is_not_shared_with_the_optimizer() -> None:
    def train(backend: Backend) -> None:
        optimizer, params = make(backend, torch.bfloat16)
        for number in range(6):
            step(optimizer, gradients(params, backend.rank, number))
        state = through_a_file(optimizer.state_dict())
        residuals = state_bits(state["onebit"])
        optimizer.load_state_dict(state)
        step(optimizer, gradients(params, backend.rank, 6))
        assert state_bits(state["onebit"]) == residuals

    run_threads(2, train)


# --- states that do not fit


def checkpoint_of(world_size: int) -> list[dict[str, Any]]:
    def train(backend: Backend) -> dict[str, Any]:
        optimizer, params = make(backend)
        for number in range(6):
            step(optimizer, gradients(params, backend.rank, number))
        return through_a_file({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]})

    return run_threads(world_size, train)


def test_another_version_or_other_parameters_are_refused_and_nothing_changes() -> None:
    good = checkpoint_of(2)[0]["optimizer"]
    fewer = {**good, "param_groups": good["param_groups"][:1]}
    other = {**good, "onebit": {**good["onebit"], "version": 7}}
    broken = {**good, "onebit": {**good["onebit"], "residuals": [{"version": 3}] * 2}}

    def load(backend: Backend) -> None:
        optimizer, params = make(backend)
        for number in range(6):
            step(optimizer, gradients(params, backend.rank, number + 20))
        before = (contents(optimizer), feedback(optimizer))
        wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
            (other, InputError, "OnebitAdam state has version 1, got 7"),
            (broken, InputError, "residual's state has version 1, got 3"),
            (fewer, ValueError, "different number of parameter groups"),
        ]
        for state, error, message in wrong:
            with pytest.raises(error, match=message):
                optimizer.load_state_dict(state)
            assert (contents(optimizer), feedback(optimizer)) == before
        step(optimizer, gradients(params, backend.rank, 26))

    run_threads(2, load)


def test_all_ranks_loading_the_file_of_one_are_told_so_on_all_ranks_and_not_by_a_timeout() -> None:
    everybody = checkpoint_of(3)[0]

    def train(backend: Backend) -> None:
        optimizer, params = make(backend)
        with torch.no_grad():
            for p, value in zip(params, everybody["params"], strict=True):
                p.copy_(value)
        optimizer.load_state_dict(through_a_file(everybody["optimizer"]))
        before = bits(params)
        error, here = (MismatchError, 1) if backend.rank == 0 else (InputError, backend.rank)
        for _ in range(2):  # nor does a second try go on without the feedback
            with pytest.raises(error, match=f"has rank 0, here it is {here}; load on every rank the state that it"):
                step(optimizer, gradients(params, backend.rank, 6))
            assert bits(params) == before

    run_threads(3, train)


def test_a_checkpoint_of_another_world_size_is_refused_with_the_way_out_and_resharded_goes_on() -> None:
    checkpoints = checkpoint_of(2)
    per_group = [Residual.reshard([c["optimizer"]["onebit"]["residuals"][g] for c in checkpoints], 3) for g in range(2)]

    def train(backend: Backend, reshard: bool) -> list[Any]:
        optimizer, params = make(backend)
        with torch.no_grad():
            for p, value in zip(params, checkpoints[0]["params"], strict=True):
                p.copy_(value)
        state = through_a_file(checkpoints[min(backend.rank, 1)]["optimizer"])
        if reshard:
            state["onebit"]["residuals"] = [states[backend.rank] for states in per_group]
        optimizer.load_state_dict(state)
        step(optimizer, gradients(params, backend.rank, 6))
        step(optimizer, gradients(params, backend.rank, 7))
        return contents(optimizer)

    with pytest.raises((InputError, MismatchError), match=r"has (world_size 2|rank 1), here it is \d; .*Residual\."):
        run_threads(3, train, False)
    first, *others = run_threads(3, train, True)
    assert all(seen == first for seen in others)


def test_a_single_rank_refuses_error_feedback_that_it_cannot_use() -> None:
    state = checkpoint_of(2)[0]["optimizer"]

    def train(backend: Backend) -> None:
        optimizer, params = make(backend)
        optimizer.load_state_dict(through_a_file(state))
        before = bits(params)
        with pytest.raises(InputError, match="is of rank 0 of 2, and a single rank compresses nothing"):
            step(optimizer, gradients(params, backend.rank, 6))
        assert bits(params) == before
        without = through_a_file(state)
        without["onebit"]["residuals"] = [{"version": 1}] * 2
        optimizer.load_state_dict(without)
        step(optimizer, gradients(params, backend.rank, 6))

    run_threads(1, train)


def test_the_state_holds_only_what_weights_only_loading_allows() -> None:
    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                assert isinstance(key, (str, int))
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        else:
            assert value is None or isinstance(value, (Tensor, int, float, str, bool)), type(value)

    for checkpoint in checkpoint_of(2):
        walk(checkpoint["optimizer"])
        assert set(checkpoint["optimizer"]) == {"state", "param_groups", "onebit"}
