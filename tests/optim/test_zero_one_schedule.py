"""The kinds of ZeroOneAdam's steps are those of its policies, in every group by itself."""

from __future__ import annotations

import itertools

import torch

from onebit.comm import Backend, run_threads
from onebit.optim import ZeroOneAdam
from onebit.optim.policies import SyncPolicy, VariancePolicy
from tests.comm.samples import bits
from tests.optim.samples import all_params, contents, gradients, mean_of, parameters, step
from tests.optim.zero_one_runs import KINDS, SOON


def test_the_schedule_of_these_tests_is_what_it_says() -> None:
    def train(backend: Backend) -> list[str]:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        seen = []
        for number in range(len(KINDS)):
            seen.append(optimizer.phase())
            step(optimizer, gradients(params, backend.rank, number))
        return seen

    assert run_threads(1, train) == [KINDS]


def test_the_schedule_is_that_of_the_policies() -> None:
    variance = VariancePolicy(var_freeze_step=8, var_update_scaler=2)
    sync = SyncPolicy(var_freeze_step=8, local_step_scaler=3, local_step_clipper=4)
    for number, kind in zip(itertools.count(1), KINDS, strict=False):
        assert variance.updates(number) == (kind == "variance")
        assert sync.synchronises(number) == (kind != "local")


def test_an_uncompressed_group_is_adamw_for_good_beside_one_with_local_steps() -> None:
    def train(backend: Backend) -> None:
        together, alone, own = parameters(), parameters()[:4], parameters()[4:]
        groups = [{"params": together[:4]}, {"params": together[4:], "compress": False}]
        optimizer = ZeroOneAdam(groups, backend=backend, **SOON)
        apart = ZeroOneAdam(alone, backend=backend, **SOON)
        adamw = torch.optim.AdamW(own, lr=1e-2)
        for number in range(23):
            assert (optimizer.phase(0), optimizer.phase(1)) == (KINDS[number], "variance")
            given = gradients(together, backend.rank, number)
            step(optimizer, given)
            step(apart, given[:4])
            step(adamw, mean_of([gradients(together, rank, number)[4:] for rank in range(2)]))
            assert bits(together[:4]) == bits(alone)
            for p, q in zip(together[4:], own, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)

    run_threads(2, train)


def test_a_group_added_in_the_middle_has_a_schedule_of_its_own_and_disturbs_nobody() -> None:
    def train(backend: Backend) -> None:
        old, new, alone = parameters()[:4], parameters()[4:], parameters()[4:]
        optimizer = ZeroOneAdam(old, backend=backend, **SOON)
        undisturbed = ZeroOneAdam(parameters()[:4], backend=backend, **SOON)
        added = ZeroOneAdam(alone, backend=backend, **SOON)
        for number in range(30):
            if number == 17:  # in the middle of an interval
                optimizer.add_param_group({"params": new})
            given = gradients([*old, *new], backend.rank, number)
            step(optimizer, given[: len(all_params(optimizer))])
            step(undisturbed, given[:4])
            assert contents(optimizer, old) == contents(undisturbed)
            if number >= 17:
                assert optimizer.phase(1) == KINDS[number - 16]
                step(added, given[4:])
                assert contents(optimizer, new) == contents(added)

    run_threads(2, train)
