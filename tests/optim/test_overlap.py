"""overlap=True changes when bytes travel and nothing else: every bit is that of the optimizer without it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from typing import Any

import pytest
import torch

from onebit.comm import Backend, run_threads
from onebit.compress import InputError, SignCodec
from onebit.optim import OnebitAdam, check_replicas, clip_grad_norm_
from tests.comm.launcher import run_ranks
from tests.optim.overlapping import Network, Seen, backward, look, make, train

UNFUSED = {"codec": SignCodec(kernels="reference")}

ZERO_ONE = {"var_freeze_step": 5, "var_update_scaler": 2, "local_step_scaler": 2, "local_step_clipper": 4}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fused": ("adam", {"freeze_step": 3}, {}),
    "unfused": ("adam", {"freeze_step": 3, **UNFUSED}, {}),
    "fresh variance": ("adam", {"freeze_step": 2, "variance_refresh": 3}, {"steps": 10}),
    "coupled decay": ("adam", {"freeze_step": 2, "adamw_mode": False, "weight_decay": 0.1}, {}),
    "masters": ("adam", {"freeze_step": 3, "master_weights": True}, {"dtype": torch.bfloat16}),
    "accumulation": ("adam", {"freeze_step": 3}, {"micro_batches": 3}),
    "bad numbers": ("adam", {"freeze_step": 3}, {"bad": (1, 5, 6)}),
    "a new start": ("adam", {"freeze_step": 3}, {"reload_at": 5}),
    "0/1 Adam": ("zero_one", ZERO_ONE, {"steps": 16, "bad": (6, 12)}),
    "0/1 Adam, unfused": ("zero_one", {**ZERO_ONE, **UNFUSED}, {"steps": 16}),
    "0/1 Adam, coupled decay": ("zero_one", {**ZERO_ONE, "adamw_mode": False}, {"steps": 16, "micro_batches": 2}),
    "1-bit LAMB": ("lamb", {"freeze_step": 3}, {"bad": (1, 5), "micro_batches": 2}),
    "automatic freeze": ("adam", {"freeze_step": "auto", "betas": (0.9, 0.8)}, {"steps": 14}),
}


def same(with_overlap: list[Seen], without: list[Seen]) -> None:
    assert [dataclasses.replace(seen, overlapped=(0, 0)) for seen in with_overlap] == without


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_that_of_steps_without_overlap(case: str) -> None:
    name, options, how = CASES[case]
    for world_size in (2, 3):
        runs = [
            run_threads(world_size, functools.partial(train, **how), name, overlap, options)
            for overlap in (True, False)
        ]
        for with_overlap, without in zip(*runs, strict=True):
            same(with_overlap, without)
        if name != "zero_one":  # whose ranks differ between synchronisations
            states = [[seen.state for seen in rank] for rank in runs[0]]
            assert states[1:] == states[:-1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_over_processes_every_bit_is_that_of_threads_without_overlap(world_size: int) -> None:
    options = {"freeze_step": 3, "variance_refresh": 4}
    how = {"steps": 9, "bad": (1, 5), "micro_batches": 2}
    processes = run_ranks("gloo", world_size, functools.partial(train, **how), "adam", True, options)
    for with_overlap, without in zip(
        processes, run_threads(world_size, functools.partial(train, **how), "adam", False, options), strict=True
    ):
        same(with_overlap, without)


def test_buckets_travel_during_backward_in_warm_up_and_after_it() -> None:
    def run(backend: Backend) -> list[tuple[int, int]]:
        network = Network()
        options = {"lr": 1e-2, "freeze_step": 3, "overlap": True, "bucket_mb": 0.0125}
        optimizer = OnebitAdam(network.layers, backend=backend, **options)  # type: ignore[arg-type]
        seen = []
        for number in range(6):
            backward(network, backend.rank, number)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(optimizer.overlapped)
        return seen

    for seen in run_threads(2, run):
        first, *others = seen
        assert first == (0, 0)  # in which ranks agree, and learn the order
        assert {early for early, _ in others} == {count - 1 for _, count in others}
        assert all(count >= 3 for _, count in others)


def test_one_rank_is_as_without_overlap() -> None:
    options = {"freeze_step": 3}
    (with_overlap,), (without,) = (run_threads(1, train, "adam", overlap, options) for overlap in (True, False))
    assert with_overlap == without


def test_ranks_that_differ_in_overlap_are_told() -> None:
    def run(backend: Backend) -> None:
        network = Network()
        optimizer = make("adam", network, backend, backend.rank == 0, freeze_step=2)
        backward(network, backend.rank, 0)
        with pytest.raises(Exception, match="overlap"):
            optimizer.step()

    run_threads(2, run)


def test_ranks_may_get_ready_in_different_orders() -> None:
    def run(backend: Backend) -> str:
        first, second = (torch.nn.Parameter(torch.full((60, 60), 0.5)) for _ in range(2))
        params = [first, second]
        optimizer = OnebitAdam(params, lr=1e-2, freeze_step=2, backend=backend, overlap=True, bucket_mb=0.01)
        for number in range(6):
            for p in params if (backend.rank + number) % 2 else params[::-1]:
                (p * (1 + number + backend.rank)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return look(optimizer).state

    one, *others = run_threads(3, run)
    assert others == [one] * 2


class Failing(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("in the middle of backward")


class Halting(Network):
    """Raises in the middle of backward when told to."""

    fails = False

    def forward(self, x: torch.Tensor, side: bool) -> torch.Tensor:
        weight, bias, *_ = self.layers
        if self.fails:
            x = Failing.apply(torch.tanh(x @ weight + bias))  # type: ignore[no-untyped-call]
        return super().forward(x, side)


def residuals(optimizer: OnebitAdam) -> list[torch.Tensor]:
    return [
        tensor.clone()
        for reducers in optimizer._reducers
        for buckets in (reducers.residual.worker, reducers.residual.server)
        for tensor in buckets
    ]


def assert_put_back(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """To within a few roundings of the largest number involved, as `CompressedWork.undo` promises."""
    for then, now in zip(before, after, strict=True):
        largest = max(float(then.abs().max()) if then.numel() else 0.0, 1.0)
        torch.testing.assert_close(now, then, rtol=0.0, atol=16 * largest * 2.0**-24)


@pytest.mark.parametrize("kind", ["threads", "gloo"])
@pytest.mark.parametrize("at", [1, 5])  # in warm-up and after it
def test_a_backward_that_fails_on_one_rank_is_a_step_that_all_skip(kind: str, at: int) -> None:
    for seen in run_ranks(kind, 2, give_up_once, at, True):
        assert seen == (1, True)


@pytest.mark.parametrize("at", [1, 5])
def test_gradients_dropped_by_all_ranks_are_a_step_that_all_skip(at: int) -> None:
    for seen in run_threads(2, give_up_once, at, False):
        assert seen == (1, True)


@pytest.mark.parametrize("fails", [True, False])
def test_a_local_step_that_is_given_up_leaves_out_what_this_rank_has(fails: bool) -> None:
    """Nobody hears of it, so the schedule goes on: as without overlap where this rank's gradients are not finite."""

    def train(backend: Backend, overlap: bool) -> tuple[list[str], int]:
        network = Halting()
        options = {"var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 4}
        optimizer = make("zero_one", network, backend, overlap, **options)
        optimizer.param_groups[2]["compress"] = True  # else it has no local steps
        given_up, seen = False, []
        for number in range(12):
            local = {optimizer.phase(group) for group in range(len(optimizer.param_groups))} == {"local"}
            if local and backend.rank == backend.size - 1 and not given_up:
                given_up = True
                network.fails = fails and overlap
                with contextlib.suppress(RuntimeError):
                    backward(network, backend.rank, number, bad=not overlap)
                (optimizer.zero_grad if overlap else optimizer.step)()
                network.fails = False
            else:
                backward(network, backend.rank, number)
                optimizer.step()
            optimizer.zero_grad()
            seen.append(look(optimizer).state)
        optimizer.synchronize()
        check_replicas(optimizer)
        assert given_up == (backend.rank == backend.size - 1)
        return seen, optimizer.left_out_steps

    assert run_threads(2, train, True) == run_threads(2, train, False)


class Refusing(Network):
    """Raises at the start of backward, before any gradient is ready, when told to."""

    fails = False

    def forward(self, x: torch.Tensor, side: bool) -> torch.Tensor:
        loss = super().forward(x, side)
        return Failing.apply(loss) if self.fails else loss  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("at", [0, 1, 5])  # the first step, in warm-up, and after it
@pytest.mark.parametrize("kind", [Refusing, Halting])
def test_a_step_with_a_gradient_that_is_not_finite_ends_one_that_failed_anywhere(
    kind: type[Refusing | Halting], at: int, overlap: bool
) -> None:
    """The lines of docs/recipes/overlap.md; before the first gradient `zero_grad` alone tells nobody, as it says."""

    def train(backend: Backend) -> int:
        network = kind()
        optimizer = make("adam", network, backend, overlap, freeze_step=3)
        for number in range(9):
            if number == at:
                before, kept = look(optimizer), residuals(optimizer)
                network.fails = backend.rank == backend.size - 1
                try:
                    backward(network, backend.rank, number)
                except RuntimeError:
                    if kind is Refusing:
                        sent = backend.traffic.collectives
                        optimizer.zero_grad()
                        assert backend.traffic.collectives == sent
                    for p in network.parameters():
                        p.grad = torch.full_like(p, torch.nan)
                    with contextlib.suppress(InputError):
                        optimizer.step()
                else:
                    optimizer.step()
                network.fails = False
                after = look(optimizer)
                assert (after.state, after.phases) == (before.state, before.phases)
                if at:
                    assert_put_back(kept, residuals(optimizer))
            optimizer.zero_grad()
            backward(network, backend.rank, number)
            optimizer.step()
        check_replicas(optimizer)
        return int(optimizer.skipped_steps)

    assert run_threads(2, train) == [1, 1]


def give_up_once(backend: Backend, at: int, fails: bool) -> tuple[int, bool]:
    """One step is given up, by a failure of the last rank or by all; returns what was skipped, and that all are equal.

    The state must be as before that step.
    """
    network = Halting()
    optimizer = make("adam", network, backend, True, freeze_step=3)
    for number in range(9):
        if number == at:
            before, kept = look(optimizer), residuals(optimizer)
            network.fails = fails and backend.rank == backend.size - 1
            try:
                backward(network, backend.rank, number)
            except RuntimeError:
                optimizer.zero_grad()
            else:
                (optimizer.step if fails else optimizer.zero_grad)()
            network.fails = False
            after = look(optimizer)
            assert (after.state, after.phases) == (before.state, before.phases)
            assert_put_back(kept, residuals(optimizer))
        optimizer.zero_grad()
        backward(network, backend.rank, number)
        optimizer.step()
    check_replicas(optimizer)
    return optimizer.skipped_steps, True


WRONG: dict[str, Any] = {
    "a second backward": lambda network, optimizer: backward(network, 0, 77),
    "torch's clipping": lambda network, optimizer: (
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1e-3),
        optimizer.step(),
    ),
    "gradients replaced": lambda network, optimizer: (
        setattr(network.layers[-2], "grad", torch.ones_like(network.layers[-2])),
        optimizer.step(),
    ),
    "model.zero_grad": lambda network, optimizer: (network.zero_grad(), optimizer.step()),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("at", [1, 5])
def test_gradients_that_change_after_they_were_sent_raise_and_no_rank_makes_the_step(wrong: str, at: int) -> None:
    def run(backend: Backend) -> None:
        network = Network()
        optimizer = make("adam", network, backend, True, freeze_step=3)
        for number in range(9):
            if number == at:
                before = look(optimizer).state
                backward(network, backend.rank, number)
                if backend.rank == 1:
                    with pytest.raises(InputError, match=r"rank 1: OnebitAdam\(overlap=True\).*no_sync"):
                        WRONG[wrong](network, optimizer)
                    optimizer.zero_grad()
                else:
                    optimizer.step()
                assert look(optimizer).state == before
                assert optimizer.skipped_steps == 1
            optimizer.zero_grad()
            backward(network, backend.rank, number)
            optimizer.step()
            assert all(r.isfinite().all() for r in residuals(optimizer))
        check_replicas(optimizer)

    run_threads(2, run)


def test_a_grad_scaler_is_refused_with_the_mend() -> None:
    def run(backend: Backend) -> None:
        network = Network()
        optimizer = make("adam", network, backend, True, freeze_step=3)
        backward(network, backend.rank, 0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        with pytest.raises(InputError, match=r"GradScaler.*bfloat16.*overlap=False"):
            optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        optimizer.step()

    run_threads(2, run)


def test_what_needs_a_whole_state_is_refused_between_backward_and_step() -> None:
    def run(backend: Backend) -> None:
        network = Network()
        optimizer = make("adam", network, backend, True, freeze_step=3)
        for number in range(2):
            saved = optimizer.state_dict()
            optimizer.zero_grad()
            backward(network, backend.rank, number)
            if number:
                for call in (
                    optimizer.state_dict,
                    lambda: optimizer.load_state_dict(saved),  # noqa: B023
                    lambda: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
                ):
                    with pytest.raises(InputError, match=r"between backward and step\(\).*zero_grad"):
                        call()
            optimizer.step()

    run_threads(2, run)


def test_clipping_over_ranks_is_refused_with_the_mend() -> None:
    def run(backend: Backend) -> None:
        network = Network()
        optimizer = make("adam", network, backend, True, freeze_step=3)
        backward(network, backend.rank, 0)
        with pytest.raises(InputError, match="overlap=False"):
            clip_grad_norm_(optimizer, 1.0)

    run_threads(2, run)


def test_parameters_that_are_trained_later_or_no_more_change_no_bit() -> None:
    def run(backend: Backend, overlap: bool) -> list[Seen]:
        network = Network()
        optimizer = make("adam", network, backend, overlap, freeze_step=5)
        network.layers[2].requires_grad_(False)
        seen = []
        for number in range(9):
            network.layers[2].requires_grad_(2 <= number < 7)
            optimizer.zero_grad()
            backward(network, backend.rank, number)
            optimizer.step()
            seen.append(look(optimizer))
        return seen

    for with_overlap, without in zip(run_threads(2, run, True), run_threads(2, run, False), strict=True):
        same(with_overlap, without)


def test_hooks_go_with_the_optimizer() -> None:
    network = Network()
    optimizer = OnebitAdam(network.parameters(), freeze_step=2, overlap=True)
    assert all(p._post_accumulate_grad_hooks for p in network.parameters())
    del optimizer
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in network.parameters())
