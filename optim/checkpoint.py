"""Checkpoints as files, one per rank, that are whole or not there, and are loaded by all ranks or by none.

    checkpoint.save(folder, optimizer, model=model.state_dict(), epoch=epoch)       # every rank
    extra = checkpoint.load(folder, optimizer)                                      # every rank, also of another number
    model.load_state_dict(extra["model"])

One folder per checkpoint: it is complete when the files of all ranks are there. Nothing is unpickled but what
``torch.load(weights_only=True)`` reads: tensors, numbers, strings and containers.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from onebit.comm import agree
from onebit.compress import InputError
from onebit.optim.base import CompressedOptimizer
from onebit.optim.common_facts import state_facts
from onebit.optim.elastic import reshard
from onebit.optim.state_keys import EXTRA, SLICES, STEP

VERSION = 1
_NAME = re.compile(r"rank-(\d+)-of-(\d+)\.pt")
_REMEDY = "Nothing was loaded. Every rank must load the same checkpoint, as one save of all ranks made it"


def save(folder: str | os.PathLike[str], optimizer: CompressedOptimizer, **extra: Any) -> Path:
    """Write this rank's file; every rank must, but none waits for another, so it works after a peer has died too.

    The file replaces an older one only when it is whole, on the disk, and can be read.

    Args:
        folder: made if it is not there.
        optimizer: whose ``state_dict()`` is saved.
        extra: what else to save, such as ``model=model.state_dict()``: tensors, numbers, strings, containers of them.

    Returns:
        The file, such as ``folder/rank-00002-of-00008.pt``.

    Raises:
        InputError: `extra` has something that ``torch.load(weights_only=True)`` would refuse; an older file stays.
        OSError, RuntimeError: the folder cannot be written, or the disk is full; an older file stays.
    """
    rank, size = optimizer.backend.rank, optimizer.backend.size
    content = {"onebit": VERSION, "rank": rank, "world_size": size, "optimizer": optimizer.state_dict(), "extra": extra}
    path = Path(folder) / f"rank-{rank:05d}-of-{size:05d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            _write(content, file)
            file.flush()
            os.fsync(file.fileno())
        _read(unfinished, mmap=True, check=False)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _flush_folder(path.parent)
    return path


def load(folder: str | os.PathLike[str], optimizer: CompressedOptimizer) -> dict[str, Any]:
    """Load what `save` wrote, on as many ranks or on another number; collective, and all ranks do it or none.

    On as many ranks each reads its own file and goes on bit for bit. On another number, or where nodes or slices are
    others, each reads the files of all ranks, which must then be in one folder; see `onebit.optim.elastic.reshard` for
    what is conserved.

    Args:
        folder: what `save` was given.
        optimizer: made with the same parameter groups; changed in place.

    Returns:
        What `save` was given as `extra` by this rank, or by rank 0 if there was no such rank; tensors on the CPU.

    Raises:
        InputError: files are missing, truncated, damaged, of different saves, or do not fit; nothing was changed, on
            any rank.
        MismatchError: the same on the other ranks, or the ranks read checkpoints that are not of one save.
        TransportError: a rank did not take part within the timeout; nothing was changed.
    """
    rank, size = optimizer.backend.rank, optimizer.backend.size
    place = optimizer._place()
    extra: dict[str, Any] = {}

    def read() -> dict[str, Any]:
        old, paths = _paths(Path(folder), rank, size)
        if old == size:
            content = _read_rank(paths[rank], rank)
            extra.update(content["extra"])
            own: dict[str, Any] = content["optimizer"]
            optimizer._check_saved(own)
            if optimizer._takes(own):
                return own
            _, paths = _paths(Path(folder), rank, size, of_all=True)
        contents = [_read_rank(paths[name], name, mmap=True) for name in sorted(paths)]
        for content in contents:
            optimizer._check_saved(content["optimizer"])
        extra.update(copy.deepcopy(contents[rank if rank < len(contents) else 0]["extra"]))
        state = reshard([content["optimizer"] for content in contents], rank, size, node=place)
        return copy.deepcopy(state)  # the files are only mapped, and may be removed

    resume(optimizer, read)
    return extra


def resume(optimizer: CompressedOptimizer, read: Callable[[], dict[str, Any]]) -> None:
    """Load the state that `read` returns, once all ranks have one and they belong together; collective.

    Raises:
        InputError: `read` raised it, or its state does not fit.
        MismatchError: another rank has raised it, or the ranks' states are not of one save.
    """
    state, refusal, facts = None, None, {}
    try:
        state = read()
        optimizer.check_state_dict(state)
        facts = _facts(state)
    except InputError as error:
        refusal = error
    agree(optimizer.backend, "loading a checkpoint", facts, refusal, remedy=_REMEDY)
    if state is not None:
        optimizer.load_state_dict(state)


def _facts(state: Mapping[str, Any]) -> dict[str, str]:
    """What the states of all ranks must have in common."""
    facts = {f"the step of group {g}": str(group.get(STEP)) for g, group in enumerate(state["param_groups"])}
    sliced = SLICES in state.get(EXTRA, {})
    facts["the state"] = "in slices" if sliced else "whole"
    return facts | state_facts({f"parameter {index}": entry for index, entry in state["state"].items()}, sliced)


def _paths(folder: Path, rank: int, size: int, *, of_all: bool = False) -> tuple[int, dict[int, Path]]:
    """How many ranks have saved, and the files that this rank needs, by the rank that wrote them.

    Args:
        of_all: those of all ranks, also if there are as many.

    Raises:
        InputError: there are none, not all, or those of several checkpoints.
    """
    who = f"rank {rank} of {size}: "
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob("rank-*.pt"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        raise InputError(f"{who}{folder} holds no file that onebit.optim.checkpoint.save has written")
    if len(found) > 1:
        raise InputError(
            f"{who}{folder} holds files of {' and of '.join(map(str, sorted(found)))} ranks; keep one folder per "
            "checkpoint, or remove those that are not meant"
        )
    ((old, paths),) = found.items()
    needed = [rank] if old == size and not of_all else range(old)
    missing = [name for name in needed if name not in paths]
    if missing:
        raise InputError(
            f"{who}{folder} lacks the files of ranks {missing} of {old}"
            + (
                ""
                if old == size and not of_all
                else ", and for another number of ranks, other nodes or slices those of all must be in one folder"
            )
            + "; the save was not finished: take an older checkpoint"
        )
    return old, {name: paths[name] for name in needed}


def _read_rank(path: Path, rank: int, *, mmap: bool = False) -> dict[str, Any]:
    """The content of a file that a certain rank must have written."""
    content = _read(path, mmap=mmap)
    written = f"{content['rank']} of {content['world_size']}"
    match = _NAME.fullmatch(path.name)
    assert match is not None
    if written != f"{rank} of {int(match[2])}":
        raise InputError(f"{path} was written by rank {written}; give it its name back, or take another checkpoint")
    return content


def _read(path: Path, *, mmap: bool = False, check: bool = True) -> dict[str, Any]:
    """Read a file without unpickling anything but tensors, numbers, strings and containers.

    Args:
        mmap: leave tensors in the file until they are looked at.
        check: read all of it to see that no byte is wrong, which torch.load does not do.

    Raises:
        InputError: it cannot be read so, is damaged, or is not of `save`.
    """
    try:
        with zipfile.ZipFile(path) as records:
            wrong = records.testzip() if check else None
        content = None if wrong else torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file leads to all kinds of them
        raise InputError(
            f"{path} cannot be read, for it is damaged or weights_only refuses it: {_brief(error)}"
        ) from error
    if wrong:
        raise InputError(f"{path} is damaged: the checksum of {wrong} is wrong; take another checkpoint")
    keys = {"onebit", "rank", "world_size", "optimizer", "extra"}
    if (
        not isinstance(content, dict)
        or content.keys() != keys
        or str(content["onebit"]) != str(VERSION)
        or not isinstance(content["extra"], dict)
    ):
        raise InputError(f"{path} is not a checkpoint of version {VERSION}, as onebit.optim.checkpoint.save writes it")
    return content


def _brief(error: Exception) -> str:
    """What an error says; of torch.load's, without the advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "Unpickler error" in line), lines[0])


def _write(content: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except (AttributeError, TypeError, pickle.PicklingError) as error:  # what pickle raises for what it cannot take
        raise InputError(
            f"this cannot be saved: {error}; give tensors, numbers, strings and containers of them"
        ) from error


def _flush_folder(folder: Path) -> None:
    """Have the new name on the disk too, where the system lets folders be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
