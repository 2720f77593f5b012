"""One checkpoint of all ranks through torch.distributed.checkpoint, over Gloo processes: exact, or dealt to others."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from onebit.comm import Backend, InputError, run_threads
from onebit.optim import CompressedOptimizer, sharded
from onebit.optim.elastic import reshard
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, state_bits
from tests.optim.resumable import KINDS, STEPS, advance, everything
from tests.optim.samples import all_params

SAVED = {"OnebitAdam": 8, "ZeroOneAdam": 11, "OnebitLamb": 8}  # 0/1 Adam in the midst of an interval


def named(optimizer: CompressedOptimizer) -> dict[str, Tensor]:
    """As `model.state_dict()`: what DCP reads into."""
    return {f"p{i}": p.detach() for i, p in enumerate(all_params(optimizer)) if p.numel()}


def save_all(backend: Backend, folder: Path) -> dict[str, Any]:
    """Train, save and go on; by kind, the state that was saved, the parameters, what came after each further step."""
    seen = {}
    for kind, steps in SAVED.items():
        optimizer = KINDS[kind].make(backend)
        advance(optimizer, backend.rank, 0, steps)
        state = {"model": named(optimizer), "optimizer": sharded.tensors_of(optimizer)}
        dcp.save(state, checkpoint_id=folder / kind)
        saved = optimizer.state_dict()
        here = [bits(p) for p in all_params(optimizer)]
        seen[kind] = (pickle.loads(pickle.dumps(saved)), here, advance(optimizer, backend.rank, steps, STEPS))
    return seen


def load_all(backend: Backend, folder: Path) -> dict[str, Any]:
    """Load and go on; by kind, what was loaded, the parameters, what came after each further step, the parameters."""
    seen = {}
    for kind, steps in SAVED.items():
        optimizer = KINDS[kind].make(backend)
        sizes = dcp.FileSystemReader(folder / kind).read_metadata().state_dict_metadata
        state = {"model": named(optimizer), "optimizer": sharded.room_for(optimizer, sizes, prefix="optimizer.")}
        dcp.load(state, checkpoint_id=folder / kind)
        sharded.load(optimizer, state["optimizer"])
        loaded, here = state_bits(optimizer.state_dict()), [bits(p) for p in all_params(optimizer)]
        after = advance(optimizer, backend.rank, steps, STEPS)
        seen[kind] = (loaded, here, after, [bits(p) for p in all_params(optimizer)])
    return seen


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint of two processes, and what they saw."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks("gloo", 2, save_all, folder)


def test_two_processes_go_on_bit_for_bit(two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, saved = two
    for before, after in zip(saved, run_ranks("gloo", 2, load_all, folder), strict=True):
        for kind in SAVED:
            assert after[kind][0] == state_bits(before[kind][0])
            assert after[kind][1:3] == before[kind][1:]


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_processes_has_what_reshard_makes_of_the_states(
    world_size: int, two: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, saved = two
    results = run_ranks("gloo", world_size, load_all, folder)
    for rank, seen in enumerate(results):
        for kind in SAVED:
            expected = reshard([before[kind][0] for before in saved], rank, world_size)
            assert seen[kind][0] == state_bits(expected)
            assert seen[kind][3] == results[0][kind][3]  # replicas are equal; 0/1 Adam's interval has ended


def test_what_is_common_is_written_once_and_all_is_tensors(two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, saved = two
    for kind in SAVED:
        listed = dcp.FileSystemReader(folder / kind).read_metadata().state_dict_metadata
        assert {type(entry).__name__ for entry in listed.values()} == {"TensorStorageMetadata"}
        ours = {name.removeprefix("optimizer."): entry for name, entry in listed.items() if name.startswith("optim")}
        numels = {name: entry.size.numel() for name, entry in ours.items()}
        state = saved[0][kind][0]
        apart = ("exp_avg", "interval_mean") if kind == "ZeroOneAdam" else ()
        large = [
            (index, key, value.numel())
            for index, entry in state["state"].items()
            for key, value in entry.items()
            if isinstance(value, Tensor) and value.numel() > 1
        ]
        assert {n: numels[n] for n in numels if n.startswith("common.")} == {
            f"common.{index}.{key}": numel for index, key, numel in large if key not in apart
        }
        per_rank = 2 * sum(p["worker"].numel() for p in state["onebit"]["residuals"])
        assert sum(n for name, n in numels.items() if name.endswith(".worker")) == per_rank


# --- what cannot be loaded


def in_memory(kind: str = "OnebitAdam", world_size: int = 2) -> list[dict[str, Tensor]]:
    def train(backend: Backend) -> dict[str, Tensor]:
        optimizer = KINDS[kind].make(backend)
        advance(optimizer, backend.rank, 0, SAVED[kind])
        return {name: t.detach().clone() for name, t in sharded.tensors_of(optimizer).items()}

    return run_threads(world_size, train)


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: SimpleNamespace(size=t.shape, properties=SimpleNamespace(dtype=t.dtype)) for name, t in tensors.items()
    }


def test_room_is_for_what_a_rank_reads_and_a_wrong_prefix_is_said() -> None:
    parts = in_memory()
    merged = {**parts[0], **parts[1]}

    def check(backend: Backend) -> None:
        optimizer = KINDS["OnebitAdam"].make(backend)
        room = sharded.room_for(optimizer, sizes_of(merged))
        if backend.size == 2:
            assert room.keys() == parts[backend.rank].keys()
        else:
            assert room.keys() == merged.keys()
        assert all(room[name].shape == merged[name].shape and room[name].dtype == merged[name].dtype for name in room)
        with pytest.raises(InputError, match=r"under 'optim\.' the checkpoint holds the state of ranks \[\]"):
            sharded.room_for(optimizer, sizes_of(merged), prefix="optim.")
        with pytest.raises(InputError, match=r"holds the state of ranks \[1\]; expected those of all"):
            sharded.room_for(optimizer, sizes_of(parts[1]))

    run_threads(2, check)
    run_threads(3, check)


def test_to_read_what_other_ranks_have_does_no_harm() -> None:
    parts = in_memory()

    def load(backend: Backend, tensors: list[dict[str, Tensor]]) -> Any:
        optimizer = KINDS["OnebitAdam"].make(backend)
        sharded.load(optimizer, tensors[backend.rank])
        return state_bits(optimizer.state_dict())

    assert run_threads(2, load, [{**parts[0], **parts[1]}] * 2) == run_threads(2, load, parts)


def test_damaged_or_missing_tensors_are_refused_and_nothing_changes() -> None:
    parts = in_memory()

    def check(backend: Backend) -> None:
        optimizer = KINDS["OnebitAdam"].make(backend)
        advance(optimizer, backend.rank, 20, 26)
        before = everything(optimizer)
        own = f"rank{backend.rank}."
        good = parts[backend.rank]
        wrong: list[tuple[dict[str, Tensor], str]] = [
            ({}, "what was read is of ranks"),
            (parts[1 - backend.rank], "what was read is of ranks"),
            (parts[0] | {"rank2.rest": parts[0]["rank0.rest"]}, "what was read is of ranks"),
            ({n: t for n, t in good.items() if n != f"{own}rest"}, f"{own}rest"),
            ({n: t for n, t in good.items() if n != "common.3.exp_avg"}, "lacks exp_avg"),
            ({n: t for n, t in good.items() if not n.endswith("worker")}, "lacks worker"),
            ({**good, f"{own}rest": good[f"{own}rest"][:-9]}, "cannot be put together"),
            ({**good, f"{own}rest": torch.zeros(99, dtype=torch.uint8)}, "cannot be put together"),
            ({**good, "common.3.exp_avg": torch.zeros(7)}, r"has exp_avg float32 \(7,\), expected floating point"),
            ({**good, "common.99.exp_avg": torch.zeros(7)}, "cannot be put together"),
            ({**good, f"{own}parameter.0": torch.zeros(7)}, r"of parameter 0 is of shape \(7,\)"),
        ]
        for tensors, message in wrong:
            with pytest.raises(InputError, match=message):
                sharded.load(optimizer, tensors)
            assert everything(optimizer) == before

    run_threads(2, check)
