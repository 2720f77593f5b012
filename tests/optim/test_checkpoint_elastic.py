"""A checkpoint goes on with another number of ranks: what was not said yet is conserved, and one warning says so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onebit.comm import Backend, InputError, run_threads
from onebit.optim import checkpoint
from onebit.optim.elastic import reshard
from tests.comm.oracle import UNIT
from tests.comm.samples import bits, state_bits
from tests.optim.resumable import KINDS, advance, copies, everything, put
from tests.optim.samples import all_params

Floats = np.ndarray[Any, np.dtype[np.float64]]

CHANGES = [(4, 2), (2, 3), (3, 1), (1, 4)]
OPTIMIZERS = ["OnebitAdam", "OnebitAdam, unfused", "ZeroOneAdam", "ZeroOneAdam, unfused", "OnebitLamb"]
COMPRESSED = 8  # steps; a synchronised one is the last
WITHIN = 11  # the ranks of 0/1 Adam are in the midst of an interval


def trained(kind: str, world_size: int, folder: Path, steps: int, **options: Any) -> list[dict[str, Any]]:
    """Train and save; returns every rank's state."""

    def train(backend: Backend) -> dict[str, Any]:
        optimizer = KINDS[kind].make(backend)
        for group in optimizer.param_groups:
            group.update(options)
        advance(optimizer, backend.rank, 0, steps)
        checkpoint.save(folder, optimizer, params=copies(optimizer), rank=backend.rank)
        return optimizer.state_dict()

    return run_threads(world_size, train)


def owed(states: list[dict[str, Any]], group: int) -> tuple[Floats, Floats]:
    """What error feedback adds to the next average of a group, and a bound of what it is made of, in float64."""
    residuals = [state["onebit"]["residuals"][group] for state in states]
    if "worker" not in residuals[0]:
        return np.zeros(1), np.ones(1)
    workers = [r["worker"].double().numpy() for r in residuals]
    total, bound = sum(workers) / len(workers), sum(map(abs, workers)) / len(workers)
    starts = np.cumsum([0, *residuals[0]["numels"]])
    for r in residuals:
        values = iter(r["server"].double().numpy())
        for tensor, offset, numel in r["server_spans"].tolist():
            for at in range(starts[tensor] + offset, starts[tensor] + offset + numel):
                value = next(values)
                total[at] += value
                bound[at] += abs(value)
    return total, bound


def one_of_each(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every new rank holds the servers' feedback of all elements: take each once, as the ranks will."""
    kept = []
    for rank, state in enumerate(states):
        residuals = [dict(r) for r in state["onebit"]["residuals"]]
        if rank:
            for r in residuals:
                r.update({"server": torch.zeros(0), "server_spans": torch.zeros((0, 3), dtype=torch.int64)})
        kept.append({"onebit": {"residuals": residuals}})
    return kept


def flat(state: dict[str, Any], group: int, key: str) -> Floats:
    entries = [state["state"][i][key] for i in state["param_groups"][group]["params"] if i in state["state"]]
    return np.concatenate([e.double().reshape(-1).numpy() for e in entries])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_the_next_average_gets_what_it_would_have_got(kind: str, old: int, new: int, tmp_path: Path) -> None:
    states = trained(kind, old, tmp_path, COMPRESSED)
    resharded = [reshard(states, rank, new) for rank in range(new)]
    for group in range(2):
        before, bound = owed(states, group)
        tolerance = 4 * UNIT * bound  # the mean is rounded to fp32 once, and the sum of it and the server's once
        if new > 1:
            after, _ = owed(one_of_each(resharded), group)
            assert np.all(abs(after - before) <= tolerance)
            assert (old == 1) == (not before.any())
            continue
        # One rank: β₁·m has to be what it was, and what is owed beside.
        beta1 = states[0]["param_groups"][group]["betas"][0]
        m, new_m = flat(states[0], group, "exp_avg"), flat(resharded[0], group, "exp_avg")
        assert before.any()
        assert np.all(abs(beta1 * (new_m - m) - before) <= tolerance + 4 * UNIT * abs(m))
        assert resharded[0]["onebit"]["residuals"] == [{"version": 1}] * 2


@pytest.mark.parametrize("kind", ["ZeroOneAdam", "ZeroOneAdam, unfused"])
@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 3), (3, 1)])
def test_an_interval_of_local_steps_goes_on_from_the_mean_of_the_ranks(
    kind: str, old: int, new: int, tmp_path: Path
) -> None:
    states = trained(kind, old, tmp_path, WITHIN)
    assert state_bits(states[0]["state"][0]["exp_avg"]) != state_bits(states[1]["state"][0]["exp_avg"])
    for rank in range(new):
        state = reshard(states, rank, new)
        for group in range(2):
            debt, bound = owed(states, group) if new == 1 else (0.0, 0.0)
            beta1 = state["param_groups"][group]["betas"][0]
            for key, share in (("exp_avg", debt / beta1), ("interval_mean", debt)):
                mean = np.mean([flat(s, group, key) for s in states], axis=0)
                size = np.mean([abs(flat(s, group, key)) for s in states], axis=0)
                tolerance = 4 * UNIT * (size + 2 * bound)  # each term is rounded to fp32 once, and so is their sum
                assert np.all(abs(flat(state, group, key) - mean - share) <= tolerance)
        for index, entry in state["state"].items():
            for key in ("interval_start", "interval_rate", "interval_kept", "exp_avg_sq", "step"):
                assert state_bits(entry[key]) == state_bits(states[0]["state"][index][key])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_training_goes_on_alike_on_all_new_ranks_after_one_warning(
    kind: str, old: int, new: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = trained(kind, old, tmp_path, WITHIN)

    def resume(backend: Backend) -> tuple[Any, dict[str, Any]]:
        optimizer = KINDS[kind].make(backend)
        extra = checkpoint.load(tmp_path, optimizer)
        assert extra["rank"] == (backend.rank if backend.rank < old else 0)
        put(all_params(optimizer), extra["params"])
        assert [g["step"] for g in optimizer.param_groups] == [WITHIN] * 2
        advance(optimizer, backend.rank, WITHIN, WITHIN + 1)  # 0/1 Adam: the end of the interval
        return [bits(p) for p in all_params(optimizer)], optimizer.state_dict()["state"]

    with caplog.at_level(logging.WARNING, "onebit"):
        first, *others = [(params, state_bits(state)) for params, state in run_threads(new, resume)]
    assert all(seen == first for seen in others)
    told = [r.getMessage() for r in caplog.records if "checkpoint" in r.getMessage()]
    assert told == [told[0]]
    assert told[0].startswith(f"a checkpoint of {old} rank{'s' * (old > 1)} goes on with {new}: ")
    assert len(states) == old


def test_as_many_ranks_get_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = trained("OnebitAdam", 2, tmp_path, COMPRESSED)

    def resume(backend: Backend) -> Any:
        optimizer = KINDS["OnebitAdam"].make(backend)
        checkpoint.load(tmp_path, optimizer)
        return state_bits(optimizer.state_dict())

    with caplog.at_level(logging.WARNING, "onebit"):
        assert run_threads(2, resume) == [state_bits(state) for state in states]
    assert not caplog.records


def test_without_momentum_one_rank_drops_error_feedback_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = trained("OnebitAdam", 2, tmp_path, COMPRESSED, betas=(0.0, 0.99))
    with caplog.at_level(logging.WARNING, "onebit"):
        state = reshard(states, 0, 1)
    assert state_bits(state["state"]) == state_bits(states[0]["state"])
    assert "betas[0] = 0 is dropped" in caplog.text


def test_one_rank_goes_on_as_if_the_ranks_had_told_each_other_everything(tmp_path: Path) -> None:
    """From n ranks to 1: the next step moves by the momentum that an average without compression would have."""
    states = trained("OnebitAdam", 3, tmp_path, COMPRESSED)
    debt = [owed(states, group)[0] for group in range(2)]

    def resume(backend: Backend) -> list[dict[str, Any]]:
        optimizer = KINDS["OnebitAdam"].make(backend)
        checkpoint.load(tmp_path, optimizer)
        advance(optimizer, 0, COMPRESSED, COMPRESSED + 1)
        own = [p.grad for p in all_params(optimizer)]
        return [optimizer.state_dict(), {"grads": own}]

    ((state, seen),) = run_threads(1, resume)
    for group in range(2):
        indices = state["param_groups"][group]["params"]
        g = np.concatenate([seen["grads"][i].double().reshape(-1).numpy() for i in indices])
        m = flat(states[0], group, "exp_avg")
        expected = 0.9 * m + 0.1 * g + debt[group]
        got = flat(state, group, "exp_avg")
        scale = abs(m) + abs(g) + abs(debt[group]) / 0.9
        assert np.all(abs(got - expected) <= 8 * UNIT * scale)  # a handful of roundings to fp32


# --- what does not belong together


def test_states_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    a, b, c = trained("OnebitAdam", 3, tmp_path, COMPRESSED)
    later = trained("OnebitAdam", 3, tmp_path, COMPRESSED + 1)[1]
    fewer = {**b, "state": {i: entry for i, entry in b["state"].items() if i}}
    plain = {key: value for key, value in b.items() if key != "onebit"}
    wrong: list[tuple[list[dict[str, Any]], str]] = [
        ([], "there is no state"),
        ([a, b], "expected one state of each of 3 ranks"),
        ([a, c, b], "in place 1 of 3 is the error feedback of rank 2"),
        ([a, later, c], r"rank 1 has made 9 steps and rank 0 8: the states are of different saves"),
        ([a, fewer, c], "ranks 1 and 0 have different entries"),
        ([a, plain, c], "rank 1 is not one of a compressed optimizer"),
    ]
    for states, message in wrong:
        with pytest.raises(InputError, match=message):
            reshard(states, 0, 2)
    with pytest.raises(InputError, match=r"rank must be in \[0, world_size\), got 2 of 2"):
        reshard([a, b, c], 2, 2)


def test_resharding_changes_no_state_that_it_is_given(tmp_path: Path) -> None:
    for new in (1, 2):
        states = trained("ZeroOneAdam", 3, tmp_path / str(new), WITHIN)
        before = [state_bits(state) for state in states]
        reshard(states, 0, new)
        assert [state_bits(state) for state in states] == before


def test_another_number_of_ranks_needs_the_files_of_all(tmp_path: Path) -> None:
    trained("OnebitAdam", 3, tmp_path, COMPRESSED)
    (tmp_path / "rank-00001-of-00003.pt").unlink()

    def resume(backend: Backend) -> None:
        optimizer = KINDS["OnebitAdam"].make(backend)
        before = everything(optimizer)
        with pytest.raises(InputError, match=r"lacks the files of ranks \[1\] of 3, and for another number of ranks"):
            checkpoint.load(tmp_path, optimizer)
        assert everything(optimizer) == before

    run_threads(2, resume)


def test_nothing_that_was_loaded_is_shared_with_the_files(tmp_path: Path) -> None:
    trained("OnebitAdam", 2, tmp_path, COMPRESSED)

    def resume(backend: Backend, overwrite: bool) -> Any:
        optimizer = KINDS["OnebitAdam"].make(backend)
        extra = checkpoint.load(tmp_path, optimizer)
        if overwrite and backend.rank == 0:
            for path in tmp_path.iterdir():
                path.write_bytes(b"\0" * path.stat().st_size)
        put(all_params(optimizer), extra["params"])
        return everything(optimizer)

    assert run_threads(3, resume, False) == run_threads(3, resume, True)
