"""Checkpoints of runs with `shard=True`: exact on the same nodes, and put together or cut anew for others."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from onebit.comm import Backend, InputError, MismatchError, run_threads
from onebit.optim import OnebitAdam, checkpoint, sharded
from onebit.optim.elastic import reshard
from onebit.optim.merging import merged
from tests.comm.launcher import run_ranks
from tests.comm.oracle import UNIT
from tests.comm.samples import state_bits
from tests.optim.resumable import copies, put
from tests.optim.samples import all_params, patchy, through_a_file
from tests.optim.sharded_runs import advance, late, make, whole

Floats = np.ndarray[Any, np.dtype[np.float64]]

STEPS = 9
REFRESHED = {"variance_refresh": 3}
# Ranks, ranks of a node (None: one level), whether state is in slices.
Topology = tuple[int, int | None, bool]
SLICED: Topology = (4, 2, True)


def made(backend: Backend, node: int | None, shard: bool, **options: Any) -> OnebitAdam:
    return make(backend, torch.bfloat16, local_group=node, shard=shard, master_weights=True, **{**REFRESHED, **options})


@pytest.mark.parametrize("saved", range(1, STEPS))
def test_a_state_dict_goes_on_bit_for_bit(saved: int) -> None:
    """Saved in warm-up, after the first compressed step, after a refresh, and after one that takes a parameter in."""

    def train(backend: Backend, resumed: bool) -> Any:
        optimizer = made(backend, 2, True)
        advance(optimizer, backend.rank, 0, saved, late)
        if resumed:
            state, before = through_a_file(optimizer.state_dict()), copies(optimizer)
            assert state_bits(copy.deepcopy(optimizer).state_dict()) == state_bits(state)
            optimizer = made(backend, 2, True)
            put(all_params(optimizer), before)
            optimizer.load_state_dict(state)
            assert state_bits(optimizer.state_dict()) == state_bits(state)
        return advance(optimizer, backend.rank, saved, STEPS, late), state_bits(optimizer.state_dict())

    assert run_threads(4, train, True) == run_threads(4, train, False)


def test_a_state_saved_after_one_was_loaded_and_a_group_added_goes_on_bit_for_bit() -> None:
    """Before the first step on it, which is when slices are looked at."""

    def train(backend: Backend, resumed: bool) -> Any:
        optimizer = made(backend, 2, True)
        advance(optimizer, backend.rank, 0, 5)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(7, 30))]})
        if resumed:
            optimizer = copy.deepcopy(optimizer)
        return advance(optimizer, backend.rank, 5, STEPS), state_bits(optimizer.state_dict())

    assert run_threads(4, train, True) == run_threads(4, train, False)


# --- files


def save_run(folder: Path, topology: Topology, steps: int, beta1: float = 0.9) -> list[dict[str, Any]]:
    """Train and save; returns every rank's state."""
    size, node, shard = topology

    def train(backend: Backend) -> dict[str, Any]:
        optimizer = made(backend, node, shard, variance_refresh=None, betas=(beta1, 0.99))
        advance(optimizer, backend.rank, 0, steps, patchy)
        checkpoint.save(folder, optimizer, params=copies(optimizer))
        return copy.deepcopy(optimizer.state_dict())

    return run_threads(size, train)


def load_run(folder: Path, topology: Topology, steps: int, **options: Any) -> list[tuple[dict[str, Any], Any]]:
    """Load and make two steps; returns every rank's state when it was loaded, and the parameters after the steps."""
    size, node, shard = topology

    def train(backend: Backend) -> tuple[dict[str, Any], Any]:
        optimizer = made(backend, node, shard, variance_refresh=None, betas=(0.9, 0.99), **options)
        put(all_params(optimizer), checkpoint.load(folder, optimizer)["params"])
        loaded = copy.deepcopy(optimizer.state_dict())
        return loaded, advance(optimizer, backend.rank, steps, steps + 2, patchy)

    return run_threads(size, train)


EXACT: list[tuple[Topology, Topology]] = [
    (SLICED, SLICED),
    (SLICED, (4, 2, False)),
    ((4, 2, False), SLICED),
    ((3, 3, True), (3, 3, False)),
    ((3, 3, False), (3, 3, True)),
]


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize(("old", "new"), EXACT)
def test_on_the_same_nodes_a_run_goes_on_bit_for_bit_in_slices_or_whole(
    old: Topology, new: Topology, steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size, node, _ = old

    def straight(backend: Backend) -> Any:
        optimizer = made(backend, node, False, variance_refresh=None, betas=(0.9, 0.99))
        return advance(optimizer, backend.rank, 0, steps + 2, patchy)[steps:]

    states = save_run(tmp_path, old, steps)
    with caplog.at_level(logging.WARNING, "onebit"):
        # Other buckets make other slices; what is whole holds error feedback of the buckets that there were.
        results = load_run(tmp_path, new, steps, bucket_mb=0.01 if old[2] else 0.004)
    assert [after for _, after in results] == run_threads(size, straight)
    entries = [[one["state"] for one in whole(found)] for found in ([loaded for loaded, _ in results], states)]
    assert entries[0] == entries[1]
    assert not [r for r in caplog.records if "checkpoint" in r.getMessage()]


CHANGES: list[tuple[Topology, Topology]] = [
    (SLICED, (6, 3, True)),  # as many nodes, of other slices
    ((6, 3, True), SLICED),
    (SLICED, (4, None, False)),  # one level
    ((4, None, False), SLICED),
    (SLICED, (2, None, False)),
    ((6, 2, True), (4, 2, True)),  # fewer nodes
    ((4, 2, False), (6, 2, False)),  # more, and no slices at all
    (SLICED, (2, 2, True)),  # one node
    (SLICED, (1, None, False)),
    ((2, 2, True), SLICED),  # there was no error feedback
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_other_nodes_get_what_the_old_ones_owed(
    old: Topology, new: Topology, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = save_run(tmp_path, old, 6)
    with caplog.at_level(logging.WARNING, "onebit"):
        results = load_run(tmp_path, new, 6)
    assert all(after == results[0][1] for _, after in results)
    told = [r.getMessage() for r in caplog.records if "checkpoint" in r.getMessage()]
    loaded = merged([loaded for loaded, _ in results])
    same_nodes = old[0] // (old[1] or 1) == new[0] // (new[1] or 1)
    assert len(told) == (0 if old[0] == new[0] and same_nodes else 1), told
    one_place = new[0] // (new[1] or 1) == 1
    for group in (0, 2):
        before, bound = owed_by_places(states, group)
        assert before.any() == (old != (2, 2, True))
        if one_place:
            entries = [i for i in states[0]["param_groups"][group]["params"] if i in states[0]["state"]]
            gained = flat(loaded[0], entries, "exp_avg") - flat(merged(states)[0], entries, "exp_avg")
            size = abs(flat(loaded[0], entries, "exp_avg"))
            # Rounded to fp32 once in the mean, once with the server's, once divided by β₁ and once added.
            assert np.all(abs(0.9 * gained - before) <= 6 * UNIT * (bound + size))
        else:
            after, _ = owed_by_places(loaded, group)
            assert np.all(abs(after - before) <= 4 * UNIT * bound)  # the mean is rounded to fp32 once


def owed_by_places(states: Any, group: int) -> tuple[Floats, Floats]:
    """What error feedback adds to the next average of a group, and a bound of what it is made of, in float64."""
    residuals = [state["onebit"]["residuals"][group] for state in states]
    if len(residuals[0]) == 1:
        return np.zeros(1), np.ones(1)
    numels = residuals[0]["numels"]
    dealt = sum(r["server"].numel() for r in residuals) == sum(numels)
    if not dealt:  # as states are made anew: each of a node has the node's, and every element's of the servers
        residuals = list({r["rank"]: r for r in residuals}.values())
    workers = [r["worker"].double().numpy() / r["world_size"] for r in residuals]
    total, bound = sum(workers), sum(map(abs, workers))
    starts = np.cumsum([0, *numels])
    for r in residuals if dealt else residuals[:1]:
        at = 0
        for tensor, offset, numel in r["server_spans"].tolist():
            run = slice(starts[tensor] + offset, starts[tensor] + offset + numel)
            total[run] += r["server"][at : at + numel].double().numpy()
            bound[run] += abs(r["server"][at : at + numel].double().numpy())
            at += numel
    return total, bound


def flat(state: Any, entries: list[int], key: str) -> Any:
    return np.concatenate([state["state"][i][key].double().reshape(-1).numpy() for i in entries])


# --- torch.distributed.checkpoint


def save_dcp(backend: Backend, folder: Path) -> Any:
    optimizer = made(backend, 2, True)
    advance(optimizer, backend.rank, 0, 6)
    named = {f"p{i}": p.detach() for i, p in enumerate(all_params(optimizer)) if p.numel()}
    dcp.save({"model": named, "optimizer": sharded.tensors_of(optimizer)}, checkpoint_id=folder)
    saved = copy.deepcopy(optimizer.state_dict())
    return saved, advance(optimizer, backend.rank, 6, 8)


def load_dcp(backend: Backend, folder: Path, node: int | None, shard: bool) -> Any:
    optimizer = made(backend, node, shard)
    named = {f"p{i}": p.detach() for i, p in enumerate(all_params(optimizer)) if p.numel()}
    sizes = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    room = sharded.room_for(optimizer, sizes, prefix="optimizer.")
    dcp.load({"model": named, "optimizer": room}, checkpoint_id=folder)
    sharded.load(optimizer, room)
    loaded = copy.deepcopy(optimizer.state_dict())
    return sorted(room), loaded, advance(optimizer, backend.rank, 6, 8)


def test_one_checkpoint_of_all_processes(tmp_path: Path) -> None:
    saved = run_ranks("gloo", 4, save_dcp, tmp_path)
    states, after = [state for state, _ in saved], [params for _, params in saved]
    alike = run_ranks("gloo", 4, load_dcp, tmp_path, 2, True)
    for rank, (room, loaded, _) in enumerate(alike):
        assert {name.split(".")[0] for name in room} == {f"rank{rank}"}, "what other ranks hold is not read"
        assert state_bits(loaded) == state_bits(states[rank])
    whole_again = run_ranks("gloo", 4, load_dcp, tmp_path, 2, False)
    assert [params for _, _, params in alike] == [params for _, _, params in whole_again] == after
    entries = [[one["state"] for one in whole(found)] for found in ([loaded for _, loaded, _ in whole_again], states)]
    assert entries[0] == entries[1]
    for rank, (_, loaded, _) in enumerate(run_ranks("gloo", 2, load_dcp, tmp_path, None, False)):
        assert state_bits(loaded) == state_bits(reshard(states, rank, 2))


# --- what cannot be loaded


def test_a_slice_is_refused_where_it_does_not_belong() -> None:
    def train(backend: Backend) -> None:
        optimizer = made(backend, 2, True)
        advance(optimizer, backend.rank, 0, 5)
        state = optimizer.state_dict()
        with pytest.raises(InputError, match=r"is a rank's slice, as shard=True saves it"):
            made(backend, 2, False).load_state_dict(state)
        for node, bucket_mb in ((2, 0.02), (4, 0.004)):
            other = made(backend, node, True, bucket_mb=bucket_mb)
            other.load_state_dict(state)
            assert state_bits(other.state_dict()) == state_bits(state)
            with pytest.raises((InputError, MismatchError), match="and this rank would hold others"):
                advance(other, backend.rank, 5, 6)

    run_threads(4, train)


SPOILT: dict[str, Callable[[dict[str, Any]], object]] = {
    "no dict": lambda extra: extra.update(slices=[1]),
    "a key is missing": lambda extra: extra["slices"].pop("ranks"),
    "another rank": lambda extra: extra["slices"].update(rank=7),
    "no number": lambda extra: extra["slices"].update(rank="0"),
    "a group is missing": lambda extra: extra["slices"]["spans"].pop(),
    "spans of floats": lambda extra: extra["slices"]["spans"].__setitem__(0, torch.zeros(1, 3)),
    "a run of no tensor": lambda extra: extra["slices"]["spans"][0].__setitem__((0, 0), 99),
    "a run beyond the end": lambda extra: extra["slices"]["spans"][0].__setitem__((0, 2), 10**6),
    "another run": lambda extra: extra["slices"].update(spans=[s[:-1] for s in extra["slices"]["spans"]]),
    "other shapes": lambda extra: extra["slices"]["shapes"][0].__setitem__(0, [1]),
    "no slices": lambda extra: extra.pop("slices"),
}


@pytest.fixture(scope="module")
def states() -> list[dict[str, Any]]:
    def train(backend: Backend) -> dict[str, Any]:
        optimizer = made(backend, 2, True)
        advance(optimizer, backend.rank, 0, 5)
        return optimizer.state_dict()

    return run_threads(4, train)


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_damaged_slice_is_refused_and_changes_nothing(spoil: str, states: list[dict[str, Any]]) -> None:
    state = copy.deepcopy(states[0])
    SPOILT[spoil](state["onebit"])
    optimizer = make(None, torch.bfloat16, shard=True, master_weights=True, **REFRESHED)
    before = state_bits(optimizer.state_dict())
    with pytest.raises(InputError):
        optimizer.load_state_dict(state)
    assert state_bits(optimizer.state_dict()) == before


def test_slices_of_all_ranks_are_needed(states: list[dict[str, Any]]) -> None:
    for given in ([states[0]] * 4, [*states[:3], merged(states)[3]], states[:1]):
        with pytest.raises(InputError, match=r"expected those of all ranks|one state of each|in place"):
            reshard(given, 0, 2)
