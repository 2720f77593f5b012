"""The measured choice: compressed where the link is slow, plain where kernels are, alike on all ranks, made once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from onebit.benchmarks.launch import Host, launch, loopback
from onebit.benchmarks.namespaces import NetworkError, shaped_hosts
from onebit.benchmarks.net import rank_on
from onebit.comm import (
    Backend,
    CompressedAllreduce,
    MismatchError,
    Tuning,
    clock,
    make_backend,
    run_threads,
    tune,
    tuning,
)
from onebit.comm.auto import BucketMode
from onebit.compress import InputError, SignCodec
from tests.comm.launcher import needs_mpi, run_ranks

NUMEL = 1 << 19


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small sizes, one round."""
    monkeypatch.setattr(tuning, "SIZES", (64, 256))
    monkeypatch.setattr(clock, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "KERNEL_NUMEL", 1024)


def made(plain: tuple[float, ...], compressed: tuple[float, ...], numels: tuple[int, ...] = (100, 1000)) -> Tuning:
    seconds: dict[BucketMode, tuple[float, ...]] = {"plain": plain, "compressed": compressed}
    rates = {"encode": 1e9, "reduce_encode": 1e9, "decode": 1e9}
    return Tuning(
        backend="gloo",
        ranks=2,
        device="cpu",
        latency=1e-4,
        bandwidth=1e8,
        kernel_rates=rates,
        numels=numels,
        seconds=seconds,
    )


def test_the_faster_way_is_picked_between_and_beyond_the_measured_sizes() -> None:
    found = made(plain=(1.0, 10.0), compressed=(3.0, 4.0))  # lines that cross at 325
    assert [found.pick(n) for n in (0, 1, 100, 300)] == ["plain"] * 4
    assert [found.pick(n) for n in (400, 1000, 10**9)] == ["compressed"] * 3
    assert found.predict("plain", 10_000) == pytest.approx(100.0)  # 0.01 an element


def test_a_gain_of_less_than_a_tenth_is_no_reason_to_compress() -> None:
    assert made(plain=(1.0, 1.0), compressed=(0.95, 0.89)).pick(100) == "plain"
    assert made(plain=(1.0, 1.0), compressed=(0.95, 0.89)).pick(1000) == "compressed"


def test_a_time_that_falls_with_the_size_is_not_drawn_on_below_zero() -> None:
    assert made(plain=(2.0, 1.0), compressed=(2.0, 1.0)).predict("plain", 10**9) == 1.0


def test_one_rank_has_nothing_to_measure_and_compresses_nothing() -> None:
    found = tune(make_backend("single"))
    assert (found.ranks, found.numels, found.pick(10**9)) == (1, (), "plain")
    assert CompressedAllreduce(torch.ones(10), make_backend("single"), mode="auto").modes == ()


def measured_twice(backend: Backend) -> tuple[str, int, int]:
    first = tune(backend)
    before = backend.traffic.collectives
    again = tune(make_backend(backend.group) if hasattr(backend, "group") else backend)
    assert again is first
    return str(first), before, backend.traffic.collectives


def measured_in_a_process(backend: Backend) -> tuple[str, int, int]:
    tuning.SIZES, clock.ROUNDS, tuning.KERNEL_NUMEL = (64, 256), 1, 1024  # the process ends with this
    return measured_twice(backend)


@pytest.mark.usefixtures("quick")
def test_all_ranks_know_the_same_and_measure_once() -> None:
    (first, before, after), *others = run_threads(3, measured_twice)
    assert before == after > 0
    assert all(other[0] == first for other in others)
    assert "256 elements: plain" in first


@pytest.mark.parametrize("kind", ["gloo", pytest.param("mpi", marks=[pytest.mark.mpi, needs_mpi])])
def test_backends_of_one_process_group_share_the_measurement(kind: str) -> None:
    (first, before, after), other = run_ranks(kind, 2, measured_in_a_process)
    assert before == after
    assert other[0] == first


@pytest.mark.usefixtures("quick")
def test_what_is_no_codec_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(InputError, match=r"a codec must be a Codec, .* got 'sign'"):
        tune(codec="sign")  # type: ignore[arg-type]


def test_codecs_are_measured_apart() -> None:
    def check(backend: Backend) -> bool:
        return tune(backend) is tune(backend, codec=SignCodec(block_size=64))

    assert run_threads(2, check) == [False, False]


@pytest.mark.usefixtures("quick")
def test_a_rank_that_has_measured_before_and_one_that_has_not_are_told_instead_of_hanging() -> None:
    def check(backend: Backend) -> None:
        if backend.rank == 0:
            tuning._known[backend] = {("cpu", SignCodec()): made((1.0, 1.0), (1.0, 1.0))}
        with pytest.raises(MismatchError, match=r"mode: rank 0: auto, measured before; rank 1: auto, to be measured"):
            CompressedAllreduce(torch.ones(10), backend, mode="auto")

    run_threads(2, check)


@pytest.mark.usefixtures("quick")
def test_the_programs_random_numbers_are_left_alone() -> None:
    def check(backend: Backend) -> None:
        tune(backend)

    state = torch.get_rng_state()
    run_threads(2, check)
    assert torch.equal(torch.get_rng_state(), state)


def outcomes(hosts: Sequence[Host], folder: Path, kernels: str) -> list[dict[str, Any]]:
    """What each rank chose for NUMEL elements."""
    wanted = [f"--numel={NUMEL}", f"--kernels={kernels}", f"--output={folder}"]
    launch(hosts, wanted, module="tests.comm.tuned_rank")
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(hosts))]
    assert all(outcome["right"] for outcome in found)
    return found


# The reference kernels take tens of milliseconds for what a memory sends in one and a link of 20 Mbit/s in 600.
def test_plain_is_picked_where_the_wire_is_faster_than_the_kernels(tmp_path: Path) -> None:
    first, second = outcomes(loopback(2), tmp_path, "reference")
    assert first["modes"] == second["modes"] == ["plain"], first["measured"]
    assert first == second


def test_compressed_is_picked_on_a_slow_link(tmp_path: Path) -> None:
    try:
        with shaped_hosts("20mbit") as hosts:
            first, second = outcomes([rank_on(host) for host in hosts], tmp_path, "reference")
    except NetworkError as error:
        pytest.skip(f"needs root, iproute2 and network namespaces: {error}")
    assert first["modes"] == second["modes"] == ["compressed"], first["measured"]
    assert first == second
