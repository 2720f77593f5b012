"""Plain buckets among compressed ones: the exact mean on all ranks, error feedback that waits, the same contract."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, InputError, MismatchError, run_threads
from onebit.comm.auto import BucketMode
from onebit.comm.tuning import Tuning
from tests.comm.launcher import run_ranks
from tests.comm.samples import SMALL_BUCKET, bits, normal, samples, state_bits


def plain(backend: Backend, bucket_mb: float = SMALL_BUCKET) -> CompressedAllreduce:
    return CompressedAllreduce(samples(0, 0), backend, mode="plain", bucket_mb=bucket_mb)


def averaged(backend: Backend, bucket_mb: float) -> list[Tensor]:
    tensors = samples(backend.rank, 0)
    plain(backend, bucket_mb)(tensors)
    return tensors


@pytest.mark.parametrize("bucket_mb", [SMALL_BUCKET, 16.0])
@pytest.mark.parametrize(("kind", "world_size"), [("threads", 1), ("threads", 2), ("threads", 5), ("gloo", 3)])
def test_the_mean_is_that_of_float64_and_the_same_on_all_ranks(kind: str, world_size: int, bucket_mb: float) -> None:
    first, *others = run_ranks(kind, world_size, averaged, bucket_mb)
    assert all(bits(other) == bits(first) for other in others)
    for index, mean in enumerate(first):
        inputs = torch.stack([samples(rank, 0)[index].double() for rank in range(world_size)])
        # Each addition and the division round once in float32, and the mean once to its dtype.
        slack = world_size * 2.0**-24 * inputs.abs().mean(0) + torch.finfo(mean.dtype).eps * inputs.mean(0).abs()
        assert bool(((mean.double() - inputs.mean(0)).abs() <= slack + torch.finfo(mean.dtype).tiny).all())


def test_error_feedback_waits_for_the_next_compressed_average() -> None:
    def check(backend: Backend) -> None:
        compressed = CompressedAllreduce(samples(0, 0), backend, bucket_mb=SMALL_BUCKET)
        compressed(samples(backend.rank, 0))
        before = state_bits(compressed.state_dict())
        between = plain(backend)
        between.load_state_dict(compressed.state_dict())
        between(samples(backend.rank, 1))
        work = between.start(samples(backend.rank, 2))
        work.finish()
        work.undo()
        assert state_bits(between.state_dict()) == before

    run_threads(2, check)


def test_it_sends_four_bytes_an_element_in_one_collective_a_bucket() -> None:
    def check(backend: Backend) -> tuple[int, int, int]:
        tensor = normal(0, numel=3 * 4096)
        reduce = CompressedAllreduce(tensor, backend, mode="plain", bucket_mb=4096 * 4 / 2**20)
        reduce(tensor)
        return len(reduce.modes), reduce.stats.wire_bytes, reduce.stats.collectives

    assert run_threads(2, check) == [(3, 4 * 3 * 4096, 3)] * 2


def test_masked_elements_count_for_nothing_and_become_zero() -> None:
    mask = normal(5, numel=2000) < 0.0

    def check(backend: Backend) -> None:
        tensor = normal(backend.rank, numel=2000)
        expected = (normal(0, numel=2000) + normal(1, numel=2000)) / 2
        tensor[mask] = math.nan
        reduce = CompressedAllreduce(tensor, backend, mode="plain")
        reduce.set_mask([mask])
        reduce(tensor)
        assert torch.equal(tensor, expected.masked_fill(mask, 0.0))

    run_threads(2, check)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_all_ranks_see_a_bad_number_before_anything_changes(bad: float) -> None:
    def check(backend: Backend) -> None:
        reduce = plain(backend)
        tensors = samples(backend.rank, 1)
        if backend.rank == 1:
            tensors[5].view(-1)[900] = bad
        given = bits(tensors)
        work = reduce.start(tensors)
        work.finish()
        assert not work.all_finite()
        work.undo()
        assert bits(tensors) == given
        assert all(bool(t.isfinite().all()) for t in reduce.state_dict().values() if isinstance(t, Tensor))
        work = reduce.start(samples(backend.rank, 2))
        work.finish()
        assert work.all_finite()
        work.accept()

    run_threads(2, check)


def crossing_at(numel: int) -> Tuning:
    """A machine on which buckets above `numel` are faster compressed."""
    seconds: dict[BucketMode, tuple[float, ...]] = {"plain": (0.0, 2.0), "compressed": (1.0, 1.0)}
    return Tuning(
        backend="threads",
        ranks=2,
        device="cpu",
        latency=0.0,
        bandwidth=1.0,
        kernel_rates={},
        numels=(1, 2 * numel),
        seconds=seconds,
    )


def mixed(backend: Backend, inputs: Sequence[Tensor]) -> CompressedAllreduce:
    """An average whose last bucket is smaller than the others."""
    return CompressedAllreduce(inputs, backend, mode="auto", bucket_mb=4096 * 4 / 2**20)


def test_each_bucket_travels_as_the_measurement_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebit.comm.tuning.tune", lambda *arguments, **options: crossing_at(3000))
    numels = [6000, 1000]  # blocks of 1024: one bucket of 4096 elements, and what is left

    def check(backend: Backend) -> list[bytes]:
        inputs = [normal(backend.rank, 0, i, numel=n) for i, n in enumerate(numels)]
        expected = {}
        for mode in ("plain", "compressed"):
            expected[mode] = [t.clone() for t in inputs]
            CompressedAllreduce(inputs, backend, mode=mode, bucket_mb=4096 * 4 / 2**20)(expected[mode])
        reduce = mixed(backend, inputs)
        assert sorted(reduce.modes) == ["compressed", "plain"]
        work = reduce.start(inputs)
        work.finish()
        assert work.all_finite()
        work.decode(inputs)
        parts = zip(reduce.modes, reduce.parts, strict=True)
        for mode, part in parts:
            for s in part.layout.segments:
                span, tensor = slice(s.offset, s.offset + s.numel), part.used[s.tensor]
                assert torch.equal(inputs[tensor][span], expected[mode][tensor][span])
        return bits(inputs)

    first, second = run_threads(2, check)
    assert first == second


@pytest.mark.parametrize("index", [0, 6900])
def test_a_bad_number_in_either_kind_of_bucket_is_seen(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebit.comm.tuning.tune", lambda *arguments, **options: crossing_at(3000))

    def check(backend: Backend) -> bool:
        tensor = normal(backend.rank, numel=7000)
        reduce = mixed(backend, [tensor])
        assert len(set(reduce.modes)) == 2
        if backend.rank == 1:
            tensor[index] = math.nan
        work = reduce.start([tensor])
        work.finish()
        seen = not work.all_finite()
        work.undo()
        # What is undone is the old residual, 0, to within rounding of numbers of about 4.
        return seen and float(reduce.state_dict()["worker"].abs().max()) < 1e-5

    assert all(run_threads(2, check))


def test_an_encoder_of_the_caller_is_refused_where_a_bucket_is_plain() -> None:
    def check(backend: Backend) -> None:
        with pytest.raises(InputError, match=r"start_with\(\) fills compressed payloads.*mode='compressed'"):
            plain(backend).start_with(lambda part: None)

    run_threads(2, check)


def test_an_unknown_mode_is_refused_with_the_good_ones() -> None:
    with pytest.raises(InputError, match="one of 'compressed', 'plain', 'auto', got 'dense'"):
        CompressedAllreduce(torch.ones(3), mode="dense")  # type: ignore[arg-type]


def test_ranks_with_different_modes_are_told() -> None:
    def check(backend: Backend) -> None:
        mode: BucketMode = "plain" if backend.rank else "compressed"
        with pytest.raises(MismatchError, match="do not agree on mode: rank 0: compressed; rank 1: plain"):
            CompressedAllreduce(torch.ones(3), backend, mode=mode)

    run_threads(2, check)
