"""Checkpoints that are truncated, damaged, incomplete or mixed up: a clear error on every rank, and nothing changes."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebit.comm import Backend, InputError, MismatchError, run_threads
from onebit.optim import checkpoint
from tests.optim.resumable import KINDS, advance, copies, everything

SAVED = 8
FILES = ["rank-00000-of-00002.pt", "rank-00001-of-00002.pt"]


def save_two(folder: Path, steps: int = SAVED) -> list[Any]:
    """Two ranks train and save; returns what they had."""

    def train(backend: Backend) -> Any:
        optimizer = KINDS["OnebitAdam"].make(backend)
        advance(optimizer, backend.rank, 0, steps)
        checkpoint.save(folder, optimizer, params=copies(optimizer))
        return everything(optimizer)[1]

    return run_threads(2, train)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_two(folder)
    return folder


def refused(folder: Path, world_size: int = 2) -> list[str]:
    """Load on every rank, which must fail on all and change none; returns what the ranks were told."""

    def load(backend: Backend) -> str:
        optimizer = KINDS["OnebitAdam"].make(backend)
        advance(optimizer, backend.rank, 20, 26)
        before = everything(optimizer)
        with pytest.raises((InputError, MismatchError)) as told:
            checkpoint.load(folder, optimizer)
        assert everything(optimizer) == before
        advance(optimizer, backend.rank, 26, 27)  # nor is it in the way of going on
        return f"{type(told.value).__name__}: {told.value}"

    return run_threads(world_size, load)


def removed(folder: Path) -> None:
    (folder / FILES[1]).unlink()


def truncated(folder: Path) -> None:
    content = (folder / FILES[1]).read_bytes()
    (folder / FILES[1]).write_bytes(content[: len(content) // 2])


def emptied(folder: Path) -> None:
    (folder / FILES[1]).write_bytes(b"")


def with_a_wrong_bit(folder: Path) -> None:
    """In error feedback, which differs by rank, so that no comparison of ranks would find it."""
    content = bytearray((folder / FILES[1]).read_bytes())
    loaded = torch.load(folder / FILES[1], weights_only=True)
    worker = loaded["optimizer"]["onebit"]["residuals"][0]["worker"].numpy().tobytes()
    content[content.index(worker) + 9] ^= 1
    (folder / FILES[1]).write_bytes(content)


def of_something_else(folder: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, folder / FILES[1])


def with_code_in_it(folder: Path) -> None:
    torch.save({"onebit": Path}, folder / FILES[1])


def of_another_version(folder: Path) -> None:
    content = torch.load(folder / FILES[1], weights_only=True)
    torch.save({**content, "onebit": 99}, folder / FILES[1])


def of_a_later_step(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as later:
        save_two(Path(later), SAVED + 1)
        shutil.copy(Path(later) / FILES[1], folder / FILES[1])


def of_another_run(folder: Path) -> None:
    content = torch.load(folder / FILES[1], weights_only=True)
    content["optimizer"]["state"][3]["exp_avg_sq"][5] += 1e-6
    torch.save(content, folder / FILES[1])


def another_ranks(folder: Path) -> None:
    shutil.copy(folder / FILES[0], folder / FILES[1])


def of_other_parameters(folder: Path) -> None:
    content = torch.load(folder / FILES[1], weights_only=True)
    content["optimizer"]["state"][3]["exp_avg"] = torch.zeros(7)
    torch.save(content, folder / FILES[1])


def beside_another(folder: Path) -> None:
    shutil.copy(folder / FILES[0], folder / "rank-00000-of-00004.pt")


# What rank 1 or both are told; where it is rank 1's file alone, rank 0 is told so too.
DAMAGES: dict[Callable[[Path], None], str] = {
    removed: r"lacks the files of ranks \[1\] of 2; the save was not finished: take an older checkpoint",
    truncated: "cannot be read, for it is damaged or weights_only refuses it",
    emptied: "cannot be read, for it is damaged or weights_only refuses it",
    with_a_wrong_bit: r"rank-00001-of-00002\.pt is damaged: the checksum of \S+ is wrong; take another checkpoint",
    of_something_else: "is not a checkpoint of version 1, as onebit.optim.checkpoint.save writes it",
    with_code_in_it: "cannot be read, for it is damaged or weights_only refuses it",
    of_another_version: "is not a checkpoint of version 1",
    of_a_later_step: "ranks do not agree on the step of group 0: rank 0: 8; rank 1: 9. Nothing was loaded",
    of_another_run: "ranks do not agree on exp_avg_sq of parameter 3: rank 0: checksum",
    another_ranks: "was written by rank 0 of 2; give it its name back",
    of_other_parameters: r"the state to load of parameter 3 has exp_avg float32 \(7,\), expected",
    beside_another: "holds files of 2 and of 4 ranks; keep one folder per checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_every_rank_is_told_and_none_loads(damage: Callable[[Path], None], good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    for told in refused(tmp_path):
        assert re.search(DAMAGES[damage], told), told


def test_a_folder_without_files_is_said(tmp_path: Path) -> None:
    for told in refused(tmp_path):
        assert "holds no file that onebit.optim.checkpoint.save has written" in told
    for told in refused(tmp_path / "nowhere"):
        assert "holds no file" in told


def test_what_an_interrupted_save_leaves_is_in_nobodys_way(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    (tmp_path / f"{FILES[0]}.unfinished").write_bytes(b"half of it")

    def load(backend: Backend) -> Any:
        optimizer = KINDS["OnebitAdam"].make(backend)
        checkpoint.load(tmp_path, optimizer)
        return optimizer.param_groups[0]["step"]

    assert run_threads(2, load) == [SAVED] * 2


@settings(max_examples=60)
@given(data=st.data())
def test_no_truncation_and_no_wrong_byte_is_taken_for_a_checkpoint(good: Path, data: st.DataObject) -> None:
    """A wrong byte may hit what is read by nobody, such as the padding of the file; then what is loaded is right."""
    content = bytearray((good / FILES[1]).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= data.draw(st.integers(1, 255))

    def load(backend: Backend) -> Any:
        optimizer = KINDS["OnebitAdam"].make(backend)
        before = everything(optimizer)
        try:
            checkpoint.load(folder, optimizer)
        except (InputError, MismatchError):
            assert everything(optimizer) == before
            return None
        return everything(optimizer)[1]

    def whole(backend: Backend) -> Any:
        optimizer = KINDS["OnebitAdam"].make(backend)
        checkpoint.load(good, optimizer)
        return everything(optimizer)[1]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(good / FILES[0], folder)
        (folder / FILES[1]).write_bytes(content)
        loaded = run_threads(2, load)
    assert loaded in ([None, None], run_threads(2, whole))
