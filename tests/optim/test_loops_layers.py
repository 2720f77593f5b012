"""Layers frozen and unfrozen on the way, groups added late, tied, parametrised and oddly laid out parameters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrizations

from onebit.comm import Backend, InputError, run_threads
from tests.comm.samples import bits
from tests.optim.loops import KINDS, STEPS, WARM_UP, assert_equal_on_ranks, backward, loss_of, make, network, settled
from tests.optim.samples import Gradients, all_params, contents, gradients, mean_of, parameters, step

WARM: dict[str, dict[str, Any]] = {  # for ever
    "OnebitAdam": {"freeze_step": 1000},
    "OnebitLamb": {"freeze_step": 1000},
    "ZeroOneAdam": {"var_freeze_step": 1000, "var_update_scaler": 1000},
}
LATE = (3, 5)  # of `parameters()`: a vector of 131 and four axes, channels_last


def without(given: Gradients, indices: Sequence[int]) -> Gradients:
    return [None if i in indices else g for i, g in enumerate(given)]


def start(indices: Sequence[int]) -> list[bytes]:
    return bits([parameters()[i] for i in indices])


# --- freezing and unfreezing


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["OnebitAdam", "ZeroOneAdam"])
def test_layers_frozen_and_unfrozen_in_warm_up_are_torchs(kind: str, world_size: int) -> None:
    def train(backend: Backend) -> None:
        params, copies = parameters(), parameters()
        optimizer = make(kind, params, backend, **WARM[kind])
        adamw = torch.optim.AdamW(copies, lr=1e-2)
        for number in range(10):
            frozen = LATE if 2 <= number < 6 else ()
            step(optimizer, without(gradients(params, backend.rank, number), frozen))
            mean = mean_of([gradients(params, rank, number) for rank in range(world_size)])
            step(adamw, without(mean, frozen))
            for p, expected in zip(params, copies, strict=True):
                # 0/1 Adam divides and multiplies in another order: some roundings of ten steps of 1e-2.
                torch.testing.assert_close(p, expected, rtol=0, atol=0 if kind == "OnebitAdam" else 1e-6)

    run_threads(world_size, train)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_whose_gradients_stop_in_warm_up_stands_still_until_they_come_back(kind: str, world_size: int) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = make(kind, params, backend, **WARM[kind])
        for number in range(2):
            step(optimizer, gradients(params, backend.rank, number))
        before = contents(optimizer, [params[i] for i in LATE])
        for number in range(2, 5):
            step(optimizer, without(gradients(params, backend.rank, number), LATE))
            assert contents(optimizer, [params[i] for i in LATE]) == before
        step(optimizer, gradients(params, backend.rank, 5))
        assert contents(optimizer, [params[i] for i in LATE]) != before
        assert_equal_on_ranks(backend, params)

    run_threads(world_size, train)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_after_the_freeze_a_layer_without_gradients_runs_out_and_one_whose_rate_is_0_stands_still(
    kind: str, world_size: int
) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        stays = [params[i] for i in LATE]
        moves = [p for i, p in enumerate(params) if i not in LATE]
        optimizer = make(kind, [{"params": moves}, {"params": stays}], backend)
        order = [p for group in (moves, stays) for p in group]
        for number in range(WARM_UP + 2):
            step(optimizer, gradients(order, backend.rank, number))
        settled(optimizer)
        before = bits(stays)
        step(optimizer, [*gradients(moves, backend.rank, 90), *([None] * len(stays))])
        settled(optimizer)
        assert bits(stays) != before, "momentum goes on without gradients"
        before = bits(stays)
        optimizer.param_groups[1]["lr"] = 0.0
        for number in range(91, 96):
            step(optimizer, [*gradients(moves, backend.rank, number), *([None] * len(stays))])
            assert bits(stays) == before
        optimizer.param_groups[1]["lr"] = 1e-2
        for number in range(96, 100):
            step(optimizer, gradients(order, backend.rank, number))
        settled(optimizer)
        assert bits(stays) != before
        assert_equal_on_ranks(backend, params)

    run_threads(world_size, train)


# --- gradients that come after the freeze


def late_on_one_rank(params: Sequence[Tensor], rank: int, number: int, since: int) -> Gradients:
    """Gradients of which two come from step `since` on, one of them on the last rank alone."""
    made = gradients(params, rank, number)
    return without(made, LATE) if number < since else without(made, LATE[:1]) if rank == 0 else made


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_variance_refresh_takes_in_what_has_its_first_gradient_after_the_freeze(world_size: int) -> None:
    def train(backend: Backend) -> list[Any]:
        params = parameters()
        optimizer = make("OnebitAdam", params, backend)  # refreshes in steps 10, 15, ...
        seen = []
        for number in range(STEPS):
            phase = optimizer.phase()
            step(optimizer, late_on_one_rank(params, backend.rank, number, WARM_UP + 2))
            seen.append((phase, contents(optimizer)))
            if number < 8:
                assert bits([params[i] for i in LATE]) == start(LATE)
        assert [phase for phase, _ in seen].index("refresh") == 8
        for i in LATE if world_size > 1 else LATE[1:]:
            moved = (params[i] - parameters()[i]).detach().abs()
            # A refresh and five compressed steps of 1e-2, the first of them at full size as Adam's first step is.
            assert 0.005 < float(moved.mean()) < 0.1
            assert float(optimizer.state[params[i]]["step"]) == STEPS - 8
        optimizer.load_state_dict(optimizer.state_dict())
        step(optimizer, gradients(params, backend.rank, STEPS))
        return [content for _, content in seen]

    first, *others = run_threads(world_size, train)
    assert all(other == first for other in others)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_unfrozen_layers_get_a_warm_up_of_their_own_and_nobody_else_notices(kind: str, world_size: int) -> None:
    """The group that they leave goes on bit for bit as if they had never been in it."""
    plain = {"variance_refresh": None} if kind == "OnebitAdam" else {}

    def train(backend: Backend) -> None:
        params, copies = parameters(), parameters()
        late, others = [params[i] for i in LATE], [i for i in range(len(params)) if i not in LATE]
        optimizer = make(kind, params, backend, **plain)
        alone = make(kind, [copies[i] for i in others], backend, **plain)
        before = WARM_UP + 2
        for number in range(before):
            given = gradients(params, backend.rank, number)
            step(optimizer, without(given, LATE))
            step(alone, [given[i] for i in others])
        optimizer.add_param_group({"params": iter(late), "lr": 2e-2})
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(others), len(late)]
        assert optimizer.phase(1) in ("warmup", "variance")
        fresh = make(kind, [parameters()[i] for i in LATE], backend, lr=2e-2, **plain)
        for number in range(STEPS):
            given = gradients(params, backend.rank, before + number)
            theirs, its = [given[i] for i in others], [given[i] for i in LATE]
            step(optimizer, [*theirs, *its])
            step(alone, theirs)
            step(fresh, its)
            assert contents(optimizer, [params[i] for i in others]) == contents(alone)
            assert contents(optimizer, late) == contents(fresh)
        settled(optimizer)
        assert_equal_on_ranks(backend, params)
        again = make(kind, [{"params": [copies[i] for i in others]}, {"params": all_params(fresh)}], backend, **plain)
        again.load_state_dict(optimizer.state_dict())  # who goes on from a checkpoint makes the groups as they are
        assert contents(again)[0][1] == contents(optimizer)[0][1]

    run_threads(world_size, train)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_is_refused_leaves_everybody_in_theirs(kind: str) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = make(kind, [(str(i), p) for i, p in enumerate(params)], backend)
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": [("3", params[3])]})
        for number in range(WARM_UP + 1):
            step(optimizer, without(gradients(params, backend.rank, number), LATE))
        before = [list(optimizer.param_groups[0][key]) for key in ("params", "param_names")]
        for wrong in ({"lr": -1.0}, {"params": [("3", params[3]), ("0", params[0])]}):
            with pytest.raises((InputError, ValueError)):
                optimizer.add_param_group({"params": [("3", params[3]), ("5", params[5])], **wrong})
            names, listed = optimizer.param_groups[0]["param_names"], optimizer.param_groups[0]["params"]
            assert (list(map(id, listed)), names) == (list(map(id, before[0])), before[1])
            assert len(optimizer.param_groups) == 1
            step(optimizer, without(gradients(params, backend.rank, 50), LATE))
        optimizer.add_param_group({"params": [("3", params[3])]})
        assert optimizer.param_groups[0]["param_names"] == ["0", "1", "2", "4", "5", "6"]
        assert optimizer.param_groups[1]["param_names"] == ["3"]
        step(optimizer, [None] * len(params))

    run_threads(2, train)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_new_parameters_added_in_any_phase_make_their_own_warm_up(kind: str, world_size: int) -> None:
    def train(backend: Backend, when: int) -> None:
        params, new = parameters(), [Parameter(p.detach() + 1) for p in parameters()]
        optimizer, alone = make(kind, params, backend), make(kind, parameters(), backend)
        fresh = make(kind, [Parameter(p.detach().clone()) for p in new], backend)
        for number in range(when + STEPS):
            if number == when:
                optimizer.add_param_group({"params": new})
            first, second = gradients(params, backend.rank, number), gradients(new, backend.rank, 500 + number)
            step(optimizer, [*first, *second] if number >= when else first)
            step(alone, first)
            if number >= when:
                step(fresh, second)
        assert contents(optimizer, params) == contents(alone)
        assert contents(optimizer, new) == contents(fresh)
        settled(optimizer)
        assert_equal_on_ranks(backend, [*params, *new])

    for when in (0, 2, WARM_UP + 3):
        run_threads(world_size, train, when)


# --- the shapes of models


class Tied(nn.Module):
    """One matrix that embeds and reads out, one that is orthogonal by construction, images, and a lone number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.mix = parametrizations.orthogonal(nn.Linear(12, 12, bias=False), use_trivialization=False)
        self.images = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.gain = Parameter(torch.tensor(1.0))
        self.out = nn.Linear(12, 7, bias=False)
        self.out.weight = self.embed.weight
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).roll(3 * i).view(p.shape))

    def forward(self, words: Tensor) -> Tensor:
        x = self.mix(self.embed(words))
        x = x + self.images(x.view(-1, 1, 3, 4)).mean(1).reshape(-1, 12)
        scores: Tensor = self.out(x * self.gain)
        return scores


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_tied_parametrised_and_channels_last_parameters_and_single_numbers_learn(kind: str, world_size: int) -> None:
    def train(backend: Backend) -> tuple[float, float]:
        model = Tied()
        assert len({id(p) for p in model.parameters()}) == 5
        optimizer = make(kind, model.parameters(), backend, lr=3e-2)
        losses = []
        for number in range(30):
            words = torch.tensor([(3 * k + number + backend.rank) % 7 for k in range(14)])
            loss = nn.functional.cross_entropy(model(words), (words + 2) % 7)
            losses.append(float(loss.detach()))
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            backward(loss)
            optimizer.step()
            assert model.out.weight is model.embed.weight
        settled(optimizer)
        assert_equal_on_ranks(backend, list(model.parameters()))
        assert model.images.weight.is_contiguous(memory_format=torch.channels_last)
        weight = model.mix.weight.detach()
        torch.testing.assert_close(weight @ weight.T, torch.eye(12), rtol=0, atol=1e-5)
        return losses[0], sum(losses[-3:]) / 3

    for first, last in run_threads(world_size, train):
        assert last < 0.7 * first


@pytest.mark.parametrize("kind", KINDS)
def test_complex_parameters_are_refused_by_name(kind: str) -> None:
    with pytest.raises(InputError, match=r"parameter 1 must be dense float32, .*, got complex64 \(2,\)"):
        make(kind, [Parameter(torch.ones(2)), Parameter(torch.ones(2, dtype=torch.complex64))], None)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_set_to_zero_after_the_freeze_count_as_those_that_are_none(kind: str, world_size: int) -> None:
    def train(backend: Backend, to_none: bool) -> list[Any]:
        params = parameters()
        optimizer = make(kind, params, backend)
        for number in range(STEPS):
            phase = optimizer.phase()
            given = gradients(params, backend.rank, number)
            skipped = phase in ("compressed", "sync", "local") and number % 3 == 0
            for p, g in zip(params, given, strict=True):
                p.grad = g
            if skipped:
                optimizer.zero_grad(set_to_none=to_none)
            optimizer.step()
        return contents(optimizer)

    assert run_threads(world_size, train, True) == run_threads(world_size, train, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_is_called_once_a_step_and_trains_as_a_plain_loop(kind: str) -> None:
    def train(backend: Backend) -> None:
        model, twin = network(), network()
        optimizers = [make(kind, m.parameters(), backend) for m in (model, twin)]
        for number in range(STEPS):
            calls = []

            def closure(number: int = number, calls: list[int] = calls) -> Tensor:
                calls.append(number)
                optimizers[0].zero_grad()
                loss = loss_of(model, backend.rank, number)
                backward(loss)
                return loss

            loss = optimizers[0].step(closure)
            optimizers[1].zero_grad()
            expected = loss_of(twin, backend.rank, number)
            backward(expected)
            optimizers[1].step()
            assert calls == [number]
            assert bits(loss) == bits(expected)
            assert contents(optimizers[0]) == contents(optimizers[1])

    run_threads(2, train)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_its_first_gradient_after_the_freeze_is_told_with_a_remedy(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = make(kind, params, backend, **({"variance_refresh": None} if kind == "OnebitAdam" else {}))
        for number in range(WARM_UP + 4):
            step(optimizer, late_on_one_rank(params, backend.rank, number, WARM_UP + 1))
        assert bits([params[i] for i in LATE]) == start(LATE)

    with caplog.at_level(logging.WARNING, "onebit"):
        run_threads(2, train)
    told = [
        record.getMessage() for record in caplog.records if "first gradient after the freeze" in record.getMessage()
    ]
    assert len(told) == 2, "once per rank"
    assert all("add_param_group" in text for text in told)
