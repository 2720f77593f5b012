"""What one optimizer has saved another refuses, in every way of loading, with nothing changed; a conversion is said."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, InputError, run_threads
from onebit.optim import CompressedOptimizer, CPUAdam, OnebitAdam, checkpoint, elastic, sharded
from tests.comm.samples import bits, state_bits
from tests.optim.resumable import KINDS, advance, everything
from tests.optim.samples import all_params, gradients, parameters, step, through_a_file

ALGORITHMS = ["OnebitAdam", "OnebitLamb", "ZeroOneAdam"]
CROSSWISE = list(itertools.permutations(ALGORITHMS, 2))
STEPS = [2, 8, 11]  # in warm-up, compressed, within an interval of 0/1 Adam

Load = Callable[[CompressedOptimizer, CompressedOptimizer, Path], None]


def by_itself(optimizer: CompressedOptimizer, other: CompressedOptimizer, folder: Path) -> None:
    optimizer.load_state_dict(through_a_file(other.state_dict()))


def from_files(optimizer: CompressedOptimizer, other: CompressedOptimizer, folder: Path) -> None:
    checkpoint.save(folder, other)
    optimizer.backend.barrier()
    checkpoint.load(folder, optimizer)


def from_tensors(optimizer: CompressedOptimizer, other: CompressedOptimizer, folder: Path) -> None:
    sharded.load(optimizer, {name: tensor.clone() for name, tensor in sharded.tensors_of(other).items()})


@pytest.mark.parametrize("load", [by_itself, from_files, from_tensors])
@pytest.mark.parametrize(("writer", "reader"), CROSSWISE)
def test_a_state_of_another_compressed_optimizer_is_refused_with_nothing_changed(
    writer: str, reader: str, load: Load, tmp_path: Path
) -> None:
    def refused(backend: Backend) -> None:
        for steps in STEPS:
            other, optimizer = KINDS[writer].make(backend), KINDS[reader].make(backend)
            advance(other, backend.rank, 0, steps)
            advance(optimizer, backend.rank, 20, 26)
            before, names = everything(optimizer), [set(group) for group in optimizer.param_groups]
            with pytest.raises(InputError, match=rf"{reader}: .* written by {writer}, expected {reader}'s .*from_deep"):
                load(optimizer, other, tmp_path / str(steps))
            assert everything(optimizer) == before
            assert [set(group) for group in optimizer.param_groups] == names
            advance(optimizer, backend.rank, 26, 28)

    run_threads(2, refused)


def test_files_of_another_number_of_ranks_are_refused_alike(tmp_path: Path) -> None:
    def save(backend: Backend) -> dict[str, Any]:
        optimizer = KINDS["OnebitAdam"].make(backend)
        advance(optimizer, backend.rank, 0, 8)
        checkpoint.save(tmp_path, optimizer)
        return optimizer.state_dict()

    def refused(backend: Backend) -> None:
        optimizer = KINDS["OnebitLamb"].make(backend)
        before = everything(optimizer)
        with pytest.raises(InputError, match="written by OnebitAdam, expected OnebitLamb's"):
            checkpoint.load(tmp_path, optimizer)
        assert everything(optimizer) == before

    states = run_threads(3, save)
    run_threads(2, refused)
    states[1]["onebit"]["optimizer"] = "ZeroOneAdam"
    with pytest.raises(InputError, match="rank 1 was written by ZeroOneAdam and that of rank 0 by OnebitAdam"):
        elastic.reshard(states, 0, 2)


@pytest.mark.parametrize("writer", ALGORITHMS)
def test_adam_on_one_rank_refuses_a_compressed_optimizers_state(writer: str) -> None:
    def refused(backend: Backend) -> None:
        other = KINDS[writer].make(backend)
        advance(other, 0, 0, 8)
        params = parameters()
        optimizer = CPUAdam([{"params": params[:4]}, {"params": params[4:]}])
        before = state_bits(optimizer.state_dict())
        with pytest.raises(InputError, match=rf"CPUAdam.load_state_dict: .* written by {writer}, expected Adam's"):
            optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
        assert state_bits(optimizer.state_dict()) == before

    run_threads(1, refused)


def test_a_class_that_is_derived_from_an_optimizer_has_the_same_states() -> None:
    class Mine(OnebitAdam):
        pass

    def go_on(backend: Backend) -> None:
        for writer, reader in ((Mine, OnebitAdam), (OnebitAdam, Mine)):
            params = parameters()
            one, other = (kind(params, freeze_step=2, backend=backend) for kind in (writer, reader))
            for number in range(4):
                step(one, gradients(params, backend.rank, number))
            other.load_state_dict(one.state_dict())
            assert state_bits(other.state_dict()) == state_bits(one.state_dict())

    run_threads(2, go_on)


def test_a_state_from_before_states_had_a_name_is_taken() -> None:
    def go_on(backend: Backend) -> None:
        optimizer = KINDS["OnebitAdam"].make(backend)
        advance(optimizer, backend.rank, 0, 5)
        saved = through_a_file(optimizer.state_dict())
        del saved["onebit"]["optimizer"]
        other = KINDS["OnebitAdam"].make(backend)
        other.load_state_dict(saved)
        assert state_bits(other.state_dict()) == state_bits(optimizer.state_dict())

    run_threads(2, go_on)


@pytest.mark.parametrize("name", [None, 3, "", "OnebitLam", torch.zeros(3)], ids=str)
def test_a_name_that_none_has_is_refused(name: Any) -> None:
    optimizer = OnebitAdam([Parameter(torch.ones(3))], freeze_step=2)
    state = optimizer.state_dict()
    state["onebit"]["optimizer"] = name
    with pytest.raises(InputError, match="expected OnebitAdam's"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(("writer", "reader"), CROSSWISE)
def test_moments_go_over_by_the_function_that_the_message_names(writer: str, reader: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    names: dict[str, Any] = {"torch": torch}
    exec(re.search(r"^def from_deepspeed.*?(?=^optimizer\.)", page, re.MULTILINE | re.DOTALL)[0], names)  # type: ignore[index]

    def convert(backend: Backend) -> None:
        other, optimizer = KINDS[writer].make(backend), KINDS[reader].make(backend)
        advance(other, backend.rank, 0, 2)
        options = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
        optimizer.load_state_dict(names["from_deepspeed"](through_a_file(other.state_dict()), optimizer))
        assert [group["step"] for group in optimizer.param_groups] == [2, 2]
        assert [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups] == options
        for p, q in zip(all_params(other), all_params(optimizer), strict=True):
            for key in ("exp_avg", "exp_avg_sq") if p in other.state else ():
                assert bits(optimizer.state[q][key]) == bits(other.state[p][key])
        with torch.no_grad():
            for p, q in zip(all_params(other), all_params(optimizer), strict=True):
                q.copy_(p)
        advance(optimizer, backend.rank, 2, 8)

    run_threads(2, convert)
