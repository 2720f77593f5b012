"""A run that is saved at any step and resumed goes on bit for bit, whichever way its state has travelled."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebit.comm import Backend, InputError, run_threads
from onebit.optim import CompressedOptimizer, checkpoint, sharded
from onebit.optim.state_keys import ALWAYS, EXTRA, NEVER_SAVED, PER_RANK, SHAPED
from tests.optim.resumable import KINDS, STEPS, advance, copies, everything, put
from tests.optim.samples import all_params, through_a_file

WAYS = ("state_dict", "files", "sharded")


def save(optimizer: CompressedOptimizer, way: str, folder: Path) -> Any:
    """What this rank gives to a checkpoint, if it is not in the folder."""
    if way == "files":
        checkpoint.save(folder, optimizer, params=copies(optimizer))
        return None
    if way == "sharded":
        named = sharded.tensors_of(optimizer)
        return {"params": copies(optimizer), "tensors": {name: t.detach().clone() for name, t in named.items()}}
    return through_a_file({"params": copies(optimizer), "optimizer": optimizer.state_dict()})


def load(optimizer: CompressedOptimizer, way: str, folder: Path, saved: list[Any]) -> None:
    rank = optimizer.backend.rank
    if way == "files":
        put(all_params(optimizer), checkpoint.load(folder, optimizer)["params"])
    elif way == "sharded":
        put(all_params(optimizer), saved[0]["params"])  # one model for all ranks
        sharded.load(optimizer, read(optimizer, saved))
    else:
        put(all_params(optimizer), saved[rank]["params"])
        optimizer.load_state_dict(saved[rank]["optimizer"])


def read(optimizer: CompressedOptimizer, saved: list[Any]) -> dict[str, Tensor]:
    """What torch.distributed.checkpoint does, in memory: ranks' tensors by name, of equal names the last."""
    merged = {f"here.{name}": t for one in saved for name, t in one["tensors"].items()}
    sizes = {n: SimpleNamespace(size=t.shape, properties=SimpleNamespace(dtype=t.dtype)) for n, t in merged.items()}
    room = sharded.room_for(optimizer, sizes, "here.")
    for name, t in room.items():
        t.copy_(merged[f"here.{name}"])
    return room


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    way=st.sampled_from(WAYS),
    world_size=st.sampled_from([1, 2, 2, 3]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    stop=st.integers(0, STEPS - 1),
    bad=st.none() | st.integers(0, STEPS - 1),
    used=st.booleans(),
)
@example(kind="ZeroOneAdam", way="sharded", world_size=2, dtype=torch.bfloat16, stop=11, bad=None, used=True)
@example(kind="OnebitAdam, auto", way="files", world_size=2, dtype=torch.float32, stop=9, bad=2, used=False)
def test_a_resumed_run_is_bit_equal_to_one_without_a_break(
    kind: str, way: str, world_size: int, dtype: torch.dtype, stop: int, bad: int | None, used: bool
) -> None:
    def first(backend: Backend, folder: Path) -> tuple[Any, list[Any]]:
        optimizer = KINDS[kind].make(backend, dtype)
        advance(optimizer, backend.rank, 0, stop, bad)
        saved = save(optimizer, way, folder)
        return saved, [everything(optimizer), *advance(optimizer, backend.rank, stop, STEPS, bad)]

    def second(backend: Backend, folder: Path, saved: list[Any]) -> list[Any]:
        optimizer = KINDS[kind].make(backend, dtype)
        if used:  # steps of another run that must leave no trace
            advance(optimizer, backend.rank, 50, 58)
        load(optimizer, way, folder, saved)
        for p, entry in optimizer.state.items():
            assert all(entry[key].stride() == p.stride() for key in SHAPED & entry.keys())
        return [everything(optimizer), *advance(optimizer, backend.rank, stop, STEPS, bad)]

    with tempfile.TemporaryDirectory() as name:
        results = run_threads(world_size, first, Path(name))
        resumed = run_threads(world_size, second, Path(name), [saved for saved, _ in results])
    assert resumed == [expected for _, expected in results]


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k].phases])
def test_the_short_schedules_meet_every_phase(kind: str) -> None:
    def train(backend: Backend) -> str:
        optimizer: Any = KINDS[kind].make(backend)
        seen = ""
        for number in range(STEPS):
            seen += optimizer.phase()[0]
            advance(optimizer, backend.rank, number, number + 1)
        return seen

    assert set(run_threads(2, train)) == {KINDS[kind].phases}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_and_attribute_of_an_optimizer_is_in_one_of_the_three_groups(kind: str) -> None:
    def train(backend: Backend) -> tuple[set[str], set[str]]:
        optimizer = KINDS[kind].make(backend, torch.bfloat16)
        for group in optimizer.param_groups:
            group["master_weights"] = True
        keys: set[str] = set()
        for number in range(STEPS):
            advance(optimizer, backend.rank, number, number + 1)
            state = optimizer.state_dict()
            keys |= {*state[EXTRA]} | {key for entry in state["state"].values() for key in entry}
        torchs = {*vars(torch.optim.SGD([torch.zeros(1)]))}
        return keys, {*vars(optimizer)} - torchs - {f"_{key}" for key in keys}

    (keys, attributes), _ = run_threads(2, train)
    assert keys <= ALWAYS | PER_RANK
    assert attributes <= NEVER_SAVED, "decide whether what is new belongs into a checkpoint"
    assert not NEVER_SAVED & {f"_{key}" for key in keys}


# --- files


def test_a_file_is_named_after_its_rank_holds_what_was_given_and_replaces_the_last(tmp_path: Path) -> None:
    def train(backend: Backend) -> dict[str, Any]:
        optimizer = KINDS["OnebitAdam"].make(backend)
        for epoch in range(2):
            path = checkpoint.save(tmp_path / "new" / "folder", optimizer, epoch=epoch, rng=torch.arange(3))
            assert path == tmp_path / "new" / "folder" / f"rank-0000{backend.rank}-of-00002.pt"
        return checkpoint.load(tmp_path / "new" / "folder", optimizer)

    for extra in run_threads(2, train):
        assert extra["epoch"] == 1
        assert torch.equal(extra["rng"], torch.arange(3))
    assert len(os.listdir(tmp_path / "new" / "folder")) == 2


def test_what_could_not_be_loaded_is_refused_when_it_is_saved_and_the_older_file_stays(tmp_path: Path) -> None:
    def train(backend: Backend) -> dict[str, Any]:
        optimizer = KINDS["OnebitAdam"].make(backend)
        checkpoint.save(tmp_path, optimizer, note="good")
        with pytest.raises(InputError, match="weights_only refuses"):
            checkpoint.save(tmp_path, optimizer, note=SimpleNamespace())
        return checkpoint.load(tmp_path, optimizer)

    assert run_threads(1, train) == [{"note": "good"}]
    assert os.listdir(tmp_path) == ["rank-00000-of-00001.pt"]


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_save_that_fails_anywhere_leaves_the_older_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        if failing == "torch.save":
            args[1].write(b"half of it")
        raise OSError("no space left on device")

    def train(backend: Backend) -> dict[str, Any]:
        optimizer = KINDS["OnebitAdam"].make(backend)
        checkpoint.save(tmp_path, optimizer, note="good")
        with monkeypatch.context() as patch:
            patch.setattr(failing, full)
            with pytest.raises(OSError, match="no space left"):
                checkpoint.save(tmp_path, optimizer, note="lost")
        return checkpoint.load(tmp_path, optimizer)

    assert run_threads(1, train) == [{"note": "good"}]
    assert os.listdir(tmp_path) == ["rank-00000-of-00001.pt"]
