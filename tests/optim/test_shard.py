"""`shard=True`: the steps of a run whose state is dealt to the ranks of a node are those of a replicated one."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, InputError, MismatchError, TransportError, run_threads
from onebit.comm.slice_rows import SliceRow
from onebit.compress import Codec, Int8Codec, SignCodec
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam
from onebit.optim.slices import GroupSlices
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, state_bits
from tests.optim.samples import all_params, gradients, parameters, step
from tests.optim.sharded_runs import ALL_SHAPES, CODEC, RUNS, STEPS, UNFUSED, advance, make, train, whole

# Ranks, and how many of them are a node; with one node nothing is compressed.
NODES = [(run, 4, 2) for run in RUNS]
NODES += [(run, size, 3) for run in ("refreshed, first gradients late", "bf16 with masters") for size in (3, 6)]


def both(run: str, size: int, *codecs: Codec, **options: Any) -> None:
    """The same run with the state whole, and in slices with all these codecs: the same bits after every step."""
    expected = run_threads(size, train, run, False, {**options, "codec": codecs[0]})
    for codec in codecs:
        assert_same(expected, run_threads(size, train, run, True, {**options, "codec": codec}))


def assert_same(expected: list[Any], got: list[Any]) -> None:
    for rank, ((params, _, skipped), (sliced_params, _, sliced_skipped)) in enumerate(zip(expected, got, strict=True)):
        for number, (one, other) in enumerate(zip(params, sliced_params, strict=True)):
            wrong = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
            assert not wrong, f"rank {rank}: parameters {wrong} differ after step {number}"
        assert skipped == sliced_skipped
    assert whole([state for _, state, _ in got]) == [state_bits(only(state)) for _, state, _ in expected]


def only(state: dict[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("state", "onebit")}


@pytest.mark.parametrize(("run", "size", "node"), NODES)
def test_steps_and_state_are_those_of_a_replicated_run(run: str, size: int, node: int) -> None:
    """By fused kernels and by torch's operations."""
    both(run, size, CODEC, UNFUSED, local_group=node)


@pytest.mark.parametrize(
    ("codec", "size", "node", "kernels"),
    [(CODEC, 4, 2, "cpu"), (UNFUSED, 4, 2, "torch"), (Int8Codec(block_size=64), 4, 2, "torch"), (CODEC, 3, 3, "torch")],
)
def test_what_makes_steps_is_told_and_momentum_stays_packed_between_nodes(
    codec: Codec, size: int, node: int, kernels: str
) -> None:
    def told(backend: Backend) -> None:
        optimizer = make(backend, shard=True, codec=codec, local_group=node)
        advance(optimizer, backend.rank, 0, 4)
        assert optimizer.kernels == kernels
        in_one_node, dense = node == size, optimizer.param_groups[1]["params"]
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert ("exp_avg" in optimizer.state[p]) == (in_one_node or group["params"] is dense)
        assert all("exp_avg" in state for state in optimizer.state_dict()["state"].values())

    run_threads(size, told)


def test_kernels_that_change_between_steps_change_nothing() -> None:
    """A state goes from fused steps to unfused ones and back, with the momentum as each of them keeps it."""

    def change(backend: Backend, codecs: tuple[Codec, ...]) -> list[list[bytes]]:
        optimizer, seen = make(backend, shard=True), []
        for number in range(STEPS):
            before = optimizer
            if len(codecs) > 1:
                optimizer = make(backend, shard=True, codec=codecs[number % len(codecs)])
                optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
                with torch.no_grad():
                    for p, value in zip(all_params(optimizer), all_params(before), strict=True):
                        p.copy_(value)
            seen += advance(optimizer, backend.rank, number, number + 1)
        return seen

    assert run_threads(4, change, (UNFUSED, CODEC)) == run_threads(4, change, (CODEC,))


def with_backward(backend: Backend, shard: bool) -> list[list[bytes]]:
    """Exchanges start during backward."""
    params = parameters(ALL_SHAPES)
    optimizer = OnebitAdam(
        params, lr=1e-2, backend=backend, freeze_step=2, local_group=2, bucket_mb=0.004, overlap=True, shard=shard
    )
    seen = []
    for number in range(5):
        optimizer.zero_grad()
        given = gradients(params, backend.rank, number)
        sum((p * g).sum() for p, g in zip(params, given, strict=True) if g is not None).backward()  # type: ignore[union-attr]
        optimizer.step()
        seen.append(bits(params))
    assert optimizer.overlapped[0] > 0
    return seen


def test_exchanges_that_start_during_backward_change_nothing() -> None:
    assert run_threads(4, with_backward, True) == run_threads(4, with_backward, False)


def test_any_codec_with_blocks_does() -> None:
    both("plain", 4, Int8Codec(block_size=64))


def train_with_a_slow_rank(backend: Backend, run: str, options: dict[str, Any]) -> Any:
    """Rank 1 reads what others have moved, in memory that they share, when these have gone on as far as they can."""
    write = GroupSlices.write

    def late(*arguments: Any) -> None:
        time.sleep(0.05 * (backend.rank == 1))
        write(*arguments)

    GroupSlices.write = late  # type: ignore[method-assign]  # a process of its own
    return train(backend, run, True, options)


def test_over_gloo_processes_with_another_size_of_buckets() -> None:
    expected = run_threads(4, train, "refreshed, first gradients late", False, {})
    got = run_ranks("gloo", 4, train_with_a_slow_rank, "refreshed, first gradients late", {"bucket_mb": 1.0})
    assert [params for params, _, _ in got] == [params for params, _, _ in expected]
    entries = [[one["state"] for one in whole([state for _, state, _ in seen])] for seen in (expected, got)]
    assert entries[0] == entries[1]


def test_groups_that_are_added_and_parameters_that_change_their_group() -> None:
    def grow(backend: Backend, shard: bool) -> list[list[bytes]]:
        optimizer = make(backend, shard=shard)
        moved = optimizer.param_groups[0]["params"][3]
        seen = []
        for number in range(9):
            if number == 4:
                optimizer.add_param_group({"params": [torch.nn.Parameter(normal_of(300)), moved], "freeze_step": 2})
            given = gradients(all_params(optimizer), backend.rank, number)
            if number < 4:
                given[3] = None
            step(optimizer, given)
            seen.append(bits(all_params(optimizer)))
        return seen

    assert run_threads(4, grow, True) == run_threads(4, grow, False)


def normal_of(numel: int) -> Tensor:
    return torch.linspace(-1, 1, numel)


def launched(monkeypatch: pytest.MonkeyPatch, ranks: int, of_a_machine: int) -> None:
    """Have the environment say so."""
    for name, value in (("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", of_a_machine), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))


def test_one_rank_alone_holds_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(backend: Backend, options: Any) -> list[list[bytes]]:
        optimizer = OnebitAdam(parameters(ALL_SHAPES), lr=1e-2, backend=backend, freeze_step=3, **options)
        return advance(optimizer, 0, 0, STEPS)

    launched(monkeypatch, 1, 1)
    assert run_threads(1, alone, {"local_group": "auto", "shard": True}) == run_threads(1, alone, {})


# --- what goes wrong


def test_what_cannot_be_dealt_is_refused() -> None:
    params = parameters()
    for local_group in (None, 1):
        with pytest.raises(
            InputError, match=r"makes every rank a node of its own.* give the number of ranks of a node"
        ):
            OnebitAdam(params, freeze_step=1, shard=True, local_group=local_group)
    with pytest.raises(InputError, match="shard must be True or False, got 1"):
        OnebitAdam(params, freeze_step=1, shard=1, local_group=2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shard=True needs a codec with blocks"):
        OnebitAdam(params, freeze_step=1, shard=True, local_group=2, codec=SignCodec(block_size=None))
    with pytest.raises(InputError, match="reads masters that no rank has whole; use adamw_mode=True"):
        OnebitAdam(params, freeze_step=1, shard=True, local_group=2, adamw_mode=False, master_weights=True)
    for kind, first in ((ZeroOneAdam, "var_freeze_step"), (OnebitLamb, "freeze_step")):
        with pytest.raises(InputError, match="no option 'shard'"):
            kind(params, **{first: 1}, local_group=2, shard=True)


def test_a_rank_per_machine_is_refused_at_once_or_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(backend: Backend) -> None:
        optimizer = OnebitAdam(parameters(), freeze_step=1, shard=True, backend=backend, local_group="auto")
        backend.barrier()
        launched(monkeypatch, 2, 1)  # only now it can be known
        with pytest.raises(InputError, match=f"rank {backend.rank}: .*'auto' makes every rank a node"):
            step(optimizer, gradients(all_params(optimizer), backend.rank, 0))

    run_threads(2, alone)
    with pytest.raises(InputError, match="'auto' makes every rank a node"):
        OnebitAdam(parameters(), freeze_step=1, shard=True, local_group="auto")


def test_ranks_that_differ_in_it_are_told() -> None:
    def disagree(backend: Backend) -> None:
        optimizer = make(backend, shard=backend.rank != 1)
        with pytest.raises(MismatchError, match="do not agree on shard: ranks 0, 2, 3: True; rank 1: False"):
            step(optimizer, gradients(all_params(optimizer), backend.rank, 0))

    run_threads(4, disagree)


@pytest.mark.parametrize("codec", [CODEC, UNFUSED], ids=["fused", "unfused"])
@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("from_last", [0, 1])
def test_a_step_that_fails_while_slices_are_shared_changes_nothing(
    from_last: int, number: int, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1 is one of warm-up, step 3 the first compressed one; two of three groups have their slices already."""
    exchange = SliceRow.exchange
    left: dict[int, int] = {}  # by thread, the calls until one fails; below 0, minus the calls so far

    def fails(row: SliceRow) -> None:
        left[threading.get_ident()] = calls = left.get(threading.get_ident(), 0) - 1
        if calls == 0:
            raise TransportError(0, "all_gather", 1.0, "as if a rank of the node were dead")
        exchange(row)

    def count(backend: Backend) -> int:
        optimizer = make(backend, shard=True, codec=codec)
        advance(optimizer, backend.rank, 0, number)
        left[threading.get_ident()] = 0
        advance(optimizer, backend.rank, number, number + 1)
        return -left[threading.get_ident()]

    def fail(backend: Backend, calls: int) -> None:
        optimizer = make(backend, shard=True, codec=codec)
        advance(optimizer, backend.rank, 0, number)
        params, state = bits(all_params(optimizer)), copy.deepcopy(optimizer.state_dict())
        left[threading.get_ident()] = calls - from_last
        with pytest.raises(TransportError, match="as if a rank of the node were dead"):
            step(optimizer, gradients(all_params(optimizer), backend.rank, number))
        assert bits(all_params(optimizer)) == params
        after = optimizer.state_dict()
        assert state_bits(after["state"]) == state_bits(state["state"])
        assert [g["step"] for g in after["param_groups"]] == [g["step"] for g in state["param_groups"]]
        for one, other in zip(after["onebit"]["residuals"], state["onebit"]["residuals"], strict=True):
            for key in {"worker", "server"} & other.keys():
                # It is worked out again from what was sent: to within rounding of numbers of about 10.
                torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-5)
        left[threading.get_ident()] = 0
        advance(optimizer, backend.rank, number, number + 2)  # the transport here was sound

    monkeypatch.setattr(SliceRow, "exchange", fails)
    (calls,) = set(run_threads(4, count))
    run_threads(4, fail, calls)
