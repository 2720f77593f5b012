"""Two levels are the flat average over nodes of what nodes have on average, whatever carries them, and fail as one."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from onebit.comm import (
    Backend,
    CompressedAllreduce,
    InputError,
    MismatchError,
    Part,
    Residual,
    TransportError,
    make_backend,
    run_threads,
)
from onebit.comm.threads_backend import ThreadsBackend
from onebit.comm.two_level import TwoLevelBucket, TwoLevelPart
from onebit.compress import Int8Codec, SignCodec
from tests.comm import oracle
from tests.comm.launcher import needs_mpi, run_ranks
from tests.comm.samples import (
    NUMELS,
    SMALL_BUCKET,
    SPECS,
    arrays,
    bits,
    normal,
    residual_bits,
    samples,
    server_parts,
    state_bits,
    worker_parts,
)

CALLS = 4
SHARED = "shared memory"
CODEC = SignCodec(block_size=64)
Seen = tuple[list[list[Tensor]], list[dict[str, Any]]]
BY_SHAPE = [(4, 2), (6, 2), (6, 3), (8, 4)]  # ranks, ranks of a node


@pytest.fixture(params=[SHARED, "threads"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What carries numbers inside a node of threads: their backend; or memory, as if they were processes."""
    name: str = request.param
    monkeypatch.setattr(ThreadsBackend, "in_processes", name == SHARED)
    return name


def two_levels(backend: Backend, local_group: int, bucket_mb: float, expected: str) -> Seen:
    """What one rank gets and keeps, call after call."""
    reduce = CompressedAllreduce(samples(0, 0), backend, CODEC, local_group=local_group, bucket_mb=bucket_mb)
    assert reduce.local_transport == expected
    outputs, states = [], []
    for call in range(CALLS):
        tensors = samples(backend.rank, call)
        if call % 2:
            work = reduce.start(tensors)
            work.finish()
            assert bool(work.all_finite())
            work.decode(tensors)
        else:
            reduce(tensors)
        outputs.append(tensors)
        states.append(reduce.state_dict())
    return outputs, states


def assert_follows_the_oracle(per_rank: list[Seen], k: int) -> None:
    """A flat average over nodes, in float64, of every node's mean."""
    nodes = len(per_rank) // k
    expected = oracle.CompressedMean(nodes, NUMELS, CODEC.block_size)
    largest = np.zeros(len(NUMELS))
    for call in range(CALLS):
        given = [arrays(samples(rank, call)) for rank in range(len(per_rank))]
        of_nodes = [oracle.dense_mean(given[i * k : (i + 1) * k]) for i in range(nodes)]
        means = expected(of_nodes)
        for t, (mean, (_, dtype, _)) in enumerate(zip(means, SPECS, strict=True)):
            held = [*(x[t] for x in given), *(worker[t] for worker in expected.worker), expected.server[t]]
            largest[t] = max([largest[t], *(float(np.abs(part).max(initial=0)) for part in held)])
            # As in test_allreduce, and k more roundings of the node's mean.
            slack = 2 * (call + 1) * (32 + nodes + k) * oracle.UNIT * largest[t]
            relative = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
            absolute = 0.0 if dtype == torch.float32 else torch.finfo(dtype).smallest_normal * relative
            for outputs, _ in per_rank:
                error = np.abs(arrays(outputs[call])[t] - mean)
                assert np.all(error <= slack + relative * np.abs(mean) + absolute), (call, t, expected.closest)
            for i in range(nodes):
                workers = [worker_parts(per_rank[rank][1][call])[t] for rank in range(i * k, (i + 1) * k)]
                assert np.count_nonzero(workers, axis=0).max(initial=0) <= 1, "two ranks of a node keep one error"
                assert np.all(np.abs(np.sum(workers, axis=0) - expected.worker[i][t]) <= slack), (call, t, i)
            server = server_parts([states[call] for _, states in per_rank])[t]
            assert np.all(np.abs(server - expected.server[t]) <= slack), (call, t, expected.closest)


def test_a_bucket_is_decoded_before_the_next_has_come_from_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the link works on what is left meanwhile."""
    seen: dict[int, list[str]] = defaultdict(list)

    def note(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def noted(self: object, *arguments: object) -> object:
            seen[threading.get_ident()].append(name)
            return real(self, *arguments)

        monkeypatch.setattr(kind, name, noted)

    note(TwoLevelBucket, "bring_home")
    note(TwoLevelPart, "decode")

    def average(backend: Backend) -> int:
        tensors = samples(backend.rank, 0)
        reduce = CompressedAllreduce(tensors, backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET)
        reduce(tensors)
        return len(reduce.parts)

    buckets = run_threads(4, average)[0]
    assert buckets > 1
    assert list(seen.values()) == [["bring_home", "decode"] * buckets] * 4


@pytest.mark.parametrize("bucket_mb", [16.0, SMALL_BUCKET])
@pytest.mark.parametrize(("world_size", "k"), BY_SHAPE)
def test_it_follows_the_float64_oracle_of_a_flat_average_over_nodes(
    world_size: int, k: int, bucket_mb: float, transport: str
) -> None:
    per_rank = run_threads(world_size, two_levels, k, bucket_mb, transport)
    assert_follows_the_oracle(per_rank, k)
    for outputs, _ in per_rank[1:]:
        assert list(map(bits, outputs)) == list(map(bits, per_rank[0][0]))


MPI = pytest.param("mpi", 4, 2, marks=[pytest.mark.mpi, needs_mpi])


@pytest.mark.parametrize(("kind", "world_size", "k"), [("gloo", 4, 2), ("gloo", 6, 3), MPI])
def test_processes_that_share_memory_get_the_same_bits_as_threads_that_do_not(
    kind: str, world_size: int, k: int
) -> None:
    threads = run_threads(world_size, two_levels, k, SMALL_BUCKET, "threads")
    for seen, expected in zip(run_ranks(kind, world_size, two_levels, k, SMALL_BUCKET, SHARED), threads, strict=True):
        assert list(map(bits, seen[0])) == list(map(bits, expected[0]))
        assert state_bits(seen[1]) == state_bits(expected[1])


def test_it_is_the_flat_average_of_node_means_bit_for_bit_with_other_codecs_and_masks(transport: str) -> None:
    masks = [torch.rand(3000, generator=torch.Generator().manual_seed(5)) < 0.3]

    def average(backend: Backend, codec: Any, k: int) -> list[Any]:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, codec, local_group=k if k > 1 else None)
        reduce.set_mask(masks)
        seen = []
        for call in range(3):
            x = normal(backend.rank, call)
            if k == 1:  # a rank that stands for a node of two
                x = (normal(2 * backend.rank, call) + normal(2 * backend.rank + 1, call)) / 2
            x.masked_fill_(masks[0], math.nan)
            reduce(x)
            seen.append(bits(x))
        return seen

    for codec in (
        SignCodec(),
        SignCodec(kernels="reference"),
        Int8Codec(block_size=64),
        Int8Codec(error_feedback=False),
    ):
        assert run_threads(4, average, codec, 2) == run_threads(2, average, codec, 1) * 2


def test_fewer_blocks_than_ranks_and_lists_without_elements(transport: str) -> None:
    def average(backend: Backend, like: list[Tensor], codec: Any) -> None:
        reduce = CompressedAllreduce(like, backend, codec, local_group=2)
        for _ in range(2):
            tensors = [torch.full_like(t, 1.5) for t in like]
            work = reduce.start(tensors)
            work.finish()
            work.undo()
            reduce(tensors)
            assert all(bool((t == 1.5).all()) for t in tensors)
        reduce.load_state_dict(reduce.state_dict())

    for like in ([], [torch.empty(0)], [torch.zeros(5)], [torch.zeros(()), torch.zeros(0, 3)]):
        for codec in (SignCodec(), Int8Codec()):
            run_threads(4, average, like, codec)


def test_one_rank_a_node_is_the_flat_average_and_one_node_the_exact_mean() -> None:
    def average(backend: Backend, local_group: int | None) -> tuple[Any, Any, tuple[str, ...]]:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, local_group=local_group)
        x = normal(backend.rank)
        reduce(x)
        work = reduce.start(x)
        work.undo()
        reduce.load_state_dict(reduce.state_dict())
        return bits(x), reduce.state_dict().get("world_size"), tuple(reduce.modes)

    assert run_threads(3, average, 1) == run_threads(3, average, None)
    one_node = run_threads(3, average, 3)
    assert one_node[0] == one_node[1] == one_node[2]
    assert one_node[0][1:] == (None, ("plain",))
    mean = np.frombuffer(one_node[0][0][0], np.float32)
    [exact] = oracle.dense_mean([arrays([normal(rank)]) for rank in range(3)])
    assert np.all(np.abs(mean - exact) <= 2 * oracle.dense_slack([arrays([normal(rank)]) for rank in range(3)])[0])
    assert run_threads(1, average, 1)[0][0] == bits(normal(0))


def test_a_tensor_that_fills_its_bucket_is_sent_as_it_lies_and_not_kept(transport: str) -> None:
    def average(backend: Backend) -> bool:
        numel = 4 * 64 * 5  # blocks for every rank
        whole, pieces = (CompressedAllreduce(like, backend, CODEC, local_group=2) for like in shapes(numel))
        for call in range(2):
            x = normal(backend.rank, call, numel=numel)
            parts = [part.clone() for part in x.split(numel // 2)]
            given = x.clone()
            kept = weakref.ref(given)
            work = whole.start(given)
            work.finish()
            work.decode(x)
            del given, work
            pieces(parts)
            assert bits(torch.cat(parts)) == bits(x)
        return kept() is None

    def shapes(numel: int) -> tuple[Tensor, list[Tensor]]:
        return torch.zeros(numel), [torch.zeros(numel // 2)] * 2

    assert run_threads(4, average) == [True] * 4


def test_numbers_that_are_written_where_they_are_needed_are_averaged_as_tensors_that_are_given(transport: str) -> None:
    def average(backend: Backend) -> None:
        given, written = (
            CompressedAllreduce(samples(0, 0), backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET) for _ in range(2)
        )
        for call in range(3):
            tensors = samples(backend.rank, call)
            rows = [t.float().contiguous().view(-1) for t in tensors]

            def write(part: Part, chunks: Sequence[Tensor], rows: list[Tensor] = rows) -> None:
                layout, used = part.layout, [rows[i] for i in part.used]
                flat = torch.full((layout.padded_numel,), 7.0)  # padding is not read
                for s in layout.segments:
                    flat[layout.residual_span(s)] = used[s.tensor][s.offset : s.offset + s.numel]
                for chunk, numbers in zip(chunks, flat.view(layout.chunks, -1), strict=True):
                    chunk.copy_(numbers)

            def encode(part: Part, write: Callable[..., None] = write) -> None:
                assert isinstance(part, TwoLevelPart)
                part.fill(partial(write, part))

            out = [torch.empty_like(t) for t in tensors]
            work = written.start_with(encode)
            work.finish()
            work.decode(out)
            given(tensors)
            assert bits(out) == bits(tensors)
            assert state_bits(written.state_dict()) == state_bits(given.state_dict())

    run_threads(4, average)


def test_every_rank_keeps_and_sends_between_nodes_a_kth(transport: str) -> None:
    def average(backend: Backend) -> None:
        numel = 1 << 16
        reduce = CompressedAllreduce(torch.zeros(numel), backend, local_group=2)
        assert reduce.levels is not None
        reduce.levels.inside.traffic.reset()
        reduce(normal(backend.rank, numel=numel))
        assert sum(part.numel() for part in reduce.residual.worker) == numel // 2
        assert sum(part.numel() for part in reduce.residual.server) == numel // 4
        quarter = numel // 4 // 8 + numel // 4 // 1024 * 4  # a payload: bits and scales
        between, inside = reduce.levels.between.traffic, reduce.levels.inside.traffic
        assert between.wire_bytes == 2 * quarter
        # Through memory each of the two exchanges tells the other rank by a byte.
        assert reduce.stats.local_bytes == (2 if transport == SHARED else numel // 2 * 4 + 2 * quarter)
        assert reduce.stats.wire_bytes == between.wire_bytes + inside.wire_bytes
        assert reduce.stats.collectives == 4

    run_threads(4, average)


def test_a_number_that_is_not_finite_makes_all_ranks_see_nan_and_undo_puts_feedback_back(transport: str) -> None:
    def average(backend: Backend, bucket_mb: float) -> None:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2, bucket_mb=bucket_mb)
        for call in range(2):
            reduce(normal(backend.rank, call))
        before = reduce.state_dict()
        bad = normal(backend.rank, 2)
        if backend.rank == 3:
            bad[7] = math.nan
        work = reduce.start(bad)
        work.finish()
        assert not work.all_finite()
        work.undo()
        after = reduce.state_dict()
        for side in ("worker", "server"):
            # Recomputed from what was said: a sum and a difference of numbers below 8 are rounded.
            torch.testing.assert_close(after[side], before[side], rtol=0, atol=4 * 8 * oracle.UNIT)
        reduce(bad)
        assert bool(bad[:64].isnan().all())
        assert bool(bad[64:].isfinite().all())

    for bucket_mb in (16.0, SMALL_BUCKET):
        run_threads(4, average, bucket_mb)


def test_spoiled_and_staged_parts_work_as_on_one_level(transport: str) -> None:
    def average(backend: Backend) -> None:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET)
        x, expected = normal(backend.rank), normal(backend.rank)
        CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2)(expected)
        assert len(reduce.parts) > 2
        work = reduce.start_with(*reduce.encoding([x]), send=False)
        work.send(0)
        for index in range(1, len(reduce.parts)):
            if backend.rank == 2:
                work.spoil(index)
            else:
                work.send(index)
            work.pass_on(index - 1)
        work.finish()
        assert not work.all_finite()
        work.undo()
        # Back to zero: a sum and a difference of numbers below 8 were rounded.
        assert all(float(part.abs().max()) <= 2 * 8 * oracle.UNIT for part in reduce.residual.worker)
        reduce.residual.reset()
        work = reduce.start_with(*reduce.encoding([x]), send=False)
        work.finish()
        assert bool(work.all_finite())
        work.decode([x])
        assert bits(x) == bits(expected)
        with pytest.raises(
            InputError, match="start_with\\(\\) with local_group= takes an encode that calls the one of"
        ):
            reduce.start_with(lambda part: None)

    run_threads(4, average)


def test_feedback_of_what_is_overwritten_is_put_back_from_a_mean_that_is_kept_and_else_forgotten(
    transport: str,
) -> None:
    def average(backend: Backend) -> None:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2)
        reduce(normal(backend.rank, 0))
        before, rows = reduce.state_dict(), [normal(backend.rank, 1)]
        work = reduce.start_with(*reduce.encoding(rows), send=False)
        work.send(0)
        work.pass_on(0)
        rows[0].fill_(7.0)
        work.forget(0)
        work.finish()
        work.undo()
        after = reduce.state_dict()
        if transport == SHARED:  # the mean that was encoded was never written
            before["worker"].zero_()
        for side in ("worker", "server"):  # rounded as above
            torch.testing.assert_close(after[side], before[side], rtol=0, atol=4 * 8 * oracle.UNIT)

    run_threads(4, average)


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lost_rank_is_an_error_on_all_others_that_leaves_feedback_as_before(lost: int, transport: str) -> None:
    def lose(backend: Backend) -> None:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET)
        reduce(normal(backend.rank))
        before = reduce.state_dict()
        if backend.rank == lost:
            return
        with pytest.raises(TransportError):
            reduce(normal(backend.rank, 1))
        after = reduce.state_dict()
        for side in ("worker", "server"):
            torch.testing.assert_close(after[side], before[side], rtol=0, atol=4 * 8 * oracle.UNIT)
        with pytest.raises(TransportError, match=r"an earlier .* of this group failed"):
            reduce(normal(backend.rank, 1))
        assert not backend.sound

    run_threads(4, lose, timeout=10.0)


def test_states_go_on_bit_for_bit_and_reshard_to_other_nodes_or_to_one_level() -> None:
    def run(backend: Backend, states: list[dict[str, Any]] | None) -> tuple[list[bytes], dict[str, Any]]:
        reduce = CompressedAllreduce(samples(0, 0), backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET)
        for call in range(2) if states is None else ():
            reduce(samples(backend.rank, call))
        saved = reduce.state_dict()
        if states is not None:
            reduce.load_state_dict(states[backend.rank])
        x = samples(backend.rank, 2)
        reduce(x)
        return bits(x), saved

    straight = run_threads(6, run, None)
    states = [saved for _, saved in straight]
    resumed = run_threads(6, run, states)
    assert [x for x, _ in resumed] == [x for x, _ in straight]

    def total(parts: list[Mapping[str, Any]], nodes: int) -> list[oracle.Floats]:
        """What feedback adds to the mean, per tensor."""
        worker = [np.sum([worker_parts(p)[t] for p in parts], axis=0) / nodes for t in range(len(NUMELS))]
        return [w + s for w, s in zip(worker, server_parts(parts), strict=True)]

    def load(backend: Backend, new: list[dict[str, Any]], k: int | None) -> dict[str, Any]:
        residual = Residual()
        residual.load_state_dict(new[backend.rank // (k or 1)])
        reduce = CompressedAllreduce(samples(0, 0), backend, CODEC, local_group=k, residual=residual)
        return reduce.state_dict()

    before = total(states, 3)
    for nodes, k in ((3, 2), (2, 2), (2, 3), (4, None)):  # the same, fewer and larger nodes, no nodes
        held = run_threads(nodes * (k or 1), load, Residual.reshard(states, nodes), k)
        for one, other in zip(before, total(held, nodes), strict=True):
            # A mean of three is rounded once.
            assert np.all(np.abs(one - other) <= 4 * oracle.UNIT * np.abs(one).max(initial=0))
    with pytest.raises(InputError, match="expected one state of each of 3 ranks"):
        Residual.reshard(states[:-1], 2)
    with pytest.raises(InputError, match="expected one state of each of 3 ranks"):
        Residual.reshard([*states[:-1], states[0]], 2)


def test_a_state_of_another_slice_is_refused() -> None:
    def load(backend: Backend, states: list[dict[str, Any]] | None) -> dict[str, Any]:
        reduce = CompressedAllreduce(torch.zeros(9000), backend, CODEC, local_group=2)
        reduce(normal(backend.rank, numel=9000))
        if states is not None:
            before = residual_bits(reduce.residual)
            with pytest.raises(InputError, match="another bucket size, block size or local_group"):
                reduce.load_state_dict(states[backend.rank ^ 1])
            with pytest.raises(InputError, match="the residual to load has rank"):
                reduce.load_state_dict(states[backend.rank ^ 2])
            assert residual_bits(reduce.residual) == before
        return reduce.state_dict()

    run_threads(4, load, run_threads(4, load, None))


# --- which ranks are a node


def test_a_backend_names_the_node_and_levels_are_made_once() -> None:
    def average(backend: Backend) -> list[bytes]:
        odd = backend.split(backend.rank % 2)  # nodes {0, 2} and {1, 3}
        x = normal(backend.rank)
        reduce = CompressedAllreduce(x, backend, local_group=odd)
        assert reduce.levels is not None
        assert reduce.levels.inside is odd
        before = backend.traffic.collectives
        assert CompressedAllreduce(x, backend, local_group=odd).levels is reduce.levels
        assert backend.traffic.collectives == before + 2  # to agree on the levels, and on the tensors
        reduce(x)
        return bits(x)

    def neighbours(backend: Backend) -> list[bytes]:
        x = normal([0, 2, 1, 3][backend.rank])
        CompressedAllreduce(x, backend, local_group=2)(x)
        return bits(x)

    assert run_threads(4, average) == run_threads(4, neighbours)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
        os.environ.update(before)


def find(backend: Backend, numberings: list[tuple[list[int], int]]) -> list[list[int] | str]:
    """Per numbering by a launcher, the ranks that are this rank's node; or what is wrong."""
    return [_node_of(make_backend(dist.group.WORLD), numbers, size) for numbers, size in numberings]


def _node_of(backend: Backend, numbers: list[int], local_size: int) -> list[int] | str:
    variables = {"LOCAL_RANK": str(numbers[backend.rank]), "LOCAL_WORLD_SIZE": str(local_size)}
    with environment(variables):
        try:
            reduce = CompressedAllreduce(torch.zeros(3000), backend, local_group="auto")
        except InputError as error:
            return str(error)
    if reduce.levels is None:
        return [backend.rank]
    mine = torch.tensor([backend.rank])
    everyone = mine.new_empty(reduce.levels.inside.size)
    reduce.levels.inside.all_gather(everyone, mine).wait()
    return [int(rank) for rank in everyone]


def test_auto_takes_the_ranks_of_one_machine_from_the_launcher() -> None:
    pairs, turns, alone = ([0, 1] * 3, 2), ([0, 0, 0, 1, 1, 1], 2), ([0] * 6, 1)
    uneven, mixed = ([0, 1, 2, 3, 0, 1], 4), ([0, 1, 1, 0, 0, 1], 2)
    for rank, found in enumerate(run_ranks("gloo", 6, find, [pairs, turns, alone, uneven, mixed])):
        first = rank // 2 * 2
        assert found[:3] == [[first, first + 1], [rank % 3, rank % 3 + 3], [rank]]
        assert "expected all nodes to have as many ranks, got nodes of 2, 4" in found[3]
        assert f"rank {rank}: local_group='auto': expected the ranks of a machine to be numbered" in found[4]


def test_what_is_no_local_group_is_refused_on_all_ranks() -> None:
    def refuse(backend: Backend) -> None:
        x = torch.zeros(3000)
        where = f"rank {backend.rank}: local_group="
        for wrong, expected in (
            (3, f"{where}3: expected a number of ranks that divides all 4 of them"),
            (0, f"{where}0: expected a number of ranks"),
            ("node", f"{where}'node': expected None, 'auto'"),
            (True, f"{where}True: expected None, 'auto'"),
        ):
            with pytest.raises(InputError, match=expected):
                CompressedAllreduce(x, backend, local_group=wrong)
        with pytest.raises(InputError, match="local_group= is for mode='compressed', got mode='plain'"):
            CompressedAllreduce(x, backend, mode="plain", local_group=2)
        with pytest.raises(InputError, match="local_group= needs a codec with blocks"):
            CompressedAllreduce(x, backend, SignCodec(block_size=None), local_group=2)
        with pytest.raises((InputError, MismatchError), match=r"expected a number of ranks that divides|rank 1"):
            CompressedAllreduce(x, backend, local_group=3 if backend.rank == 1 else 2)
        with pytest.raises(MismatchError, match="do not agree on local_group: ranks 0, 2: 2; ranks 1, 3: 4"):
            CompressedAllreduce(x, backend, local_group=4 if backend.rank % 2 else 2)
        uneven = backend.split(int(backend.rank == 0))
        with pytest.raises(
            MismatchError, match="local_group: rank 0: a Backend of 1 ranks; ranks 1, 2, 3: a Backend of 3"
        ):
            CompressedAllreduce(x, backend, local_group=uneven)

    run_threads(4, refuse)
