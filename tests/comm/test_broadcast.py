"""A broadcast: every bit of one rank's tensors or model on all ranks over every transport; or an error, no change."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onebit.comm import Backend, InputError, MismatchError, OnebitError, broadcast, run_threads
from tests.comm.checks import Check, Failures, assert_passed, failures_of, short
from tests.comm.launcher import GLOO, MPI, run_ranks
from tests.comm.samples import bits, normal, samples

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (3, 0), (4, 5), (2, 3, 2, 3))


def content(shape: tuple[int, ...], dtype: torch.dtype, *seed: int) -> Tensor:
    """Random bits, so NaN with payloads and denormal numbers too; of bool those that it has."""
    numel, high = int(np.prod(shape)), 2 if dtype == torch.bool else 256
    generator = np.random.default_rng([71, *seed])
    data = generator.integers(0, high, numel * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape) if numel else torch.empty(shape, dtype=dtype)


# Other memory for the same elements, as far as their shape and dtype have such a one.
PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t,
    "columns": lambda t: _turned(_turned(t).contiguous()),
    "every third": lambda t: torch.stack([t, t, t], -1)[..., 1],
    "behind others": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[min(t.numel(), 1) :].view(t.shape),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "conjugated": lambda t: t.conj().resolve_conj().conj() if t.is_complex() else t,
    "negated": lambda t: torch.complex(-t, -t).conj().imag if t.dtype in (torch.float32, torch.float64) else t,
}


def _turned(tensor: Tensor) -> Tensor:
    return tensor.permute(tuple(reversed(range(tensor.dim()))))


def assert_same(got: Tensor, expected: Tensor, what: object) -> None:
    got, expected = got.resolve_conj().resolve_neg(), expected.resolve_conj().resolve_neg()
    assert got.dtype == expected.dtype, what
    assert bits(got) == bits(expected), what


class Model(nn.Module):
    """Parameters and buffers of many dtypes, a tied parameter, a buffer that no state_dict has, and missing ones."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
        self.first = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.first.weight
        self.small = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("mask", torch.zeros(11, dtype=torch.bool))
        self.register_buffer("rotations", torch.zeros(2, 3, dtype=torch.complex64), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("missing", None)
        with torch.no_grad():
            for index, tensor in enumerate([*self.parameters(), *self.buffers()]):
                tensor.copy_(content(tuple(tensor.shape), tensor.dtype, rank, index))

    def seen(self) -> list[bytes]:
        return bits([*self.parameters(), *self.buffers()])


# --- over every transport


def check_every_dtype_and_shape_in_one_list(backend: Backend) -> None:
    source = backend.size - 1
    cases = list(itertools.product(DTYPES, SHAPES))
    given = [content(shape, dtype, backend.rank, i) for i, (dtype, shape) in enumerate(cases)]
    broadcast(given, backend, source)
    for i, ((dtype, shape), tensor) in enumerate(zip(cases, given, strict=True)):
        assert_same(tensor, content(shape, dtype, source, i), (dtype, shape))


def check_strides_of_every_kind_and_different_ones_on_ranks(backend: Backend) -> None:
    cases = list(itertools.product(DTYPES, SHAPES, range(len(PLACES))))
    places = list(PLACES.values())

    def place(rank: int, case: int) -> Tensor:
        dtype, shape, first = cases[case]
        return places[(first + rank) % len(places)](content(shape, dtype, rank, case))

    given = [place(backend.rank, case) for case in range(len(cases))]
    broadcast(given, backend)
    for case, tensor in enumerate(given):
        assert_same(tensor, content(cases[case][1], cases[case][0], 0, case), (backend.rank, cases[case]))


def check_samples(backend: Backend) -> None:
    given = samples(backend.rank, 0)
    broadcast(given, backend, backend.size - 1)
    assert bits(given) == bits(samples(backend.size - 1, 0))


def check_a_model_with_its_buffers(backend: Backend) -> None:
    model = Model(backend.rank)
    held = dict(model.named_parameters())
    broadcast(model, backend, 1)
    assert model.seen() == Model(1).seen()
    assert all(held[name] is p and p.is_leaf for name, p in model.named_parameters())
    assert model.tied.weight is model.first.weight
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in Model(1).parameters()]


def check_models_that_differ_are_refused_before_anything_moves(backend: Backend) -> None:
    model = Model(backend.rank)
    if backend.rank == 1:
        model.register_buffer("mask", torch.zeros(11, dtype=torch.uint8))
    before = model.seen()
    with pytest.raises(MismatchError) as told:
        broadcast(model, backend)
    assert f"rank {backend.rank}: broadcast: ranks do not agree on buffer mask: rank" in str(told.value)
    assert "bool (11,)" in str(told.value)
    assert "rank 1: uint8 (11,)" in str(told.value)
    assert "Nothing was exchanged or changed. Every rank must make this call with" in str(told.value)
    assert model.seen() == before
    broadcast(model := Model(backend.rank), backend)  # the group is as good as it was
    assert model.seen() == Model(0).seen()


def check_models_on_cpu_and_cuda(backend: Backend, *others: object) -> None:
    """For the files that need a GPU; `others` stand for the same ranks."""
    for place, group in itertools.product(("cpu", "cuda", "both"), (backend, *others)):
        model = Model(backend.rank)
        if place == "both":
            model.norm.cuda()
        else:
            model.to(place)
        broadcast(model, group, 1)
        assert model.seen() == Model(1).seen(), (place, group)


CHECKS: list[Check] = [
    check_every_dtype_and_shape_in_one_list,
    check_strides_of_every_kind_and_different_ones_on_ranks,
    check_samples,
    check_a_model_with_its_buffers,
    check_models_that_differ_are_refused_before_anything_moves,
]


@functools.cache
def launched(kind: str, world_size: int) -> list[Failures]:
    return run_ranks(kind, world_size, failures_of, CHECKS)


@pytest.mark.parametrize(("kind", "world_size"), [("threads", 2), ("threads", 3), GLOO[0], GLOO[-1], MPI[0]])
@pytest.mark.parametrize("check", CHECKS, ids=short)
def test_over(kind: str, world_size: int, check: Check) -> None:
    assert_passed(launched(kind, world_size), check.__name__)


def test_elements_lie_where_these_samples_say() -> None:
    whole, numbers = content((2, 3, 2, 3), torch.float32, 0), content((4, 5), torch.complex64, 0)
    made = {name: place(numbers if name == "conjugated" else whole) for name, place in PLACES.items()}
    assert [name for name, t in made.items() if t.is_contiguous()] == ["rows", "behind others", "conjugated"]
    assert (made["conjugated"].is_conj(), made["negated"].is_neg()) == (True, True)
    assert made["behind others"].storage_offset() == 1


# --- of any list


@st.composite
def lists(draw: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    return draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6))


@settings(max_examples=40, deadline=None)
@given(
    kinds=lists(),
    places=st.lists(st.sampled_from(list(PLACES)[:4]), min_size=3, max_size=3),
    world_size=st.integers(1, 4),
    together=st.sampled_from([1, 16, 100, 1 << 26]),
    data=st.data(),
)
def test_all_ranks_end_with_the_bits_of_one_however_its_tensors_lie_and_travel(
    kinds: list[tuple[tuple[int, ...], torch.dtype]],
    places: list[str],
    world_size: int,
    together: int,
    data: st.DataObject,
) -> None:
    source = data.draw(st.integers(0, world_size - 1))

    def spread(backend: Backend) -> int:
        place = PLACES[places[backend.rank % 3]]
        given = [place(content(shape, dtype, backend.rank, i)) for i, (shape, dtype) in enumerate(kinds)]
        backend.traffic.reset()
        broadcast(given, backend, source)
        for i, ((shape, dtype), tensor) in enumerate(zip(kinds, given, strict=True)):
            assert_same(tensor, content(shape, dtype, source, i), (shape, dtype))
        return backend.traffic.collectives

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["onebit.comm.broadcast"], "TOGETHER", together)
        found = run_threads(world_size, spread)
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in kinds]
    most = sum(size > 0 for size in sizes)
    if sum(sizes) <= together:
        most = min(most, 1)
    for collectives in found:
        assert collectives <= (1 + most if world_size > 1 else 0)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    steps=st.lists(st.integers(0, 9), min_size=3, max_size=3),
)
def test_elements_that_share_memory_are_refused_and_others_overwritten(
    shape: tuple[int, ...], steps: list[int]
) -> None:
    strides = tuple(steps[: len(shape)])
    places = [sum(i * s for i, s in zip(at, strides, strict=True)) for at in itertools.product(*map(range, shape))]

    def spread(backend: Backend) -> str | None:
        base = torch.full((100,), float(backend.rank))
        given = base.as_strided(shape, strides)
        try:
            broadcast(given, backend, 1)
        except OnebitError as error:
            assert bool((base == backend.rank).all()), "changed"
            return str(error)
        expected = torch.full((100,), float(backend.rank))
        expected[places] = 1.0
        assert torch.equal(base, expected), "elements and nothing else"
        return None

    first, second = run_threads(2, spread)
    assert (first is None) == (second is None)
    if len(set(places)) < len(places):
        assert first is not None
    for rank, told in enumerate((first, second)):
        if told is not None:
            assert told.startswith(
                f"rank {rank}: broadcast: tensor 0 must have its elements in places of their own, got "
            )
            assert f"float32 {shape} with strides {strides}" in told
            # What is refused needlessly has steps that interleave, which neither slices nor permutations make.
            assert sorted(strides) != [1, *np.cumprod(sorted(shape))[:-1]]


@pytest.mark.parametrize("n", [1, 2, 300])
def test_the_number_of_collectives_does_not_grow_with_that_of_tensors(n: int) -> None:
    def spread(backend: Backend) -> tuple[int, int]:
        broadcast([torch.zeros(600 // n, dtype=torch.int64) for _ in range(n)], backend)
        return backend.traffic.collectives, backend.traffic.wire_bytes

    # The comparison's 32 bytes to the other rank; and a sum's 2 (n - 1) / n of 4800 bytes.
    assert run_threads(2, spread) == [(2, 32 + 4800)] * 2


def test_one_rank_alone_keeps_its_bits_and_sends_nothing() -> None:
    def spread(backend: Backend) -> None:
        model = Model(5)
        broadcast(model, backend)
        assert model.seen() == Model(5).seen()
        assert backend.traffic.collectives == 0

    run_threads(1, spread)


def test_lists_and_modules_without_elements_are_sent() -> None:
    def spread(backend: Backend, tensors: list[Tensor] | nn.Module) -> None:
        broadcast(tensors, backend)

    for tensors in ([], [torch.empty(0)], [torch.empty(0, 3), torch.empty(0, dtype=torch.int8)], nn.ReLU()):
        run_threads(2, spread, tensors)


def test_parameters_are_overwritten_in_place_and_stay_leaves() -> None:
    def spread(backend: Backend) -> list[bytes]:
        parameters = [nn.Parameter(normal(backend.rank, i)) for i in range(2)]
        broadcast(iter(parameters))  # inside run_threads None is the thread's own backend
        assert all(p.requires_grad and p.is_leaf for p in parameters)
        return bits(parameters)

    assert run_threads(3, spread) == [bits([normal(0, 0), normal(0, 1)])] * 3


def test_autograd_sees_that_a_tensor_it_kept_was_overwritten() -> None:
    def spread(backend: Backend) -> None:
        weight = nn.Parameter(torch.full((3,), float(backend.rank)))
        out = (weight * weight).sum()
        broadcast(weight, backend)
        if backend.rank:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward()

    run_threads(2, spread)


# --- what is refused


def test_from_a_rank_that_is_not_there_or_not_agreed_on_is_refused() -> None:
    def spread(backend: Backend, source: int) -> None:
        x = normal(backend.rank)
        with pytest.raises(
            InputError, match=rf"rank {backend.rank}: broadcast: source must be in \[0, 2\), got {source}"
        ):
            broadcast(x, backend, source)
        with pytest.raises(MismatchError, match="do not agree on source: rank 0: 0; rank 1: 1"):
            broadcast(x, backend, backend.rank)
        assert bits(x) == bits(normal(backend.rank))

    for source in (-1, 2):
        run_threads(2, spread, source)


def test_a_source_that_is_wrong_on_one_rank_is_told_to_all() -> None:
    def spread(backend: Backend) -> None:
        x = normal(backend.rank)
        with pytest.raises(InputError if backend.rank else MismatchError, match=r"source must be in \[0, 2\), got 7"):
            broadcast(x, backend, 7 if backend.rank else 0)
        assert bits(x) == bits(normal(backend.rank))

    run_threads(2, spread)


class Stands(Tensor):
    """As a DTensor: a tensor that stands for another."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None


def made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a number": (lambda: 3, "expected a tensor or a list of tensors, got int; pass these or a torch.nn.Module"),
    "a state_dict": (lambda: nn.Linear(1, 1).state_dict(), "got str at position 0; pass these or a torch.nn.Module"),
    "lazy": (
        lambda: nn.LazyLinear(3),
        "parameter weight has no values yet, as its module is lazy; call the model once",
    ),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "parameter bias is on meta and has no values; give it some"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "tensor 0 must be a dense tensor, got a nested one; convert it first",
    ),
    "a DTensor": (
        lambda: torch.zeros(3).as_subclass(Stands),
        "is a Stands, which stands for other tensors; send these",
    ),
    "of inference": (
        made_in_inference_mode,
        "tensor 0 was made in torch.inference_mode and can be overwritten in that",
    ),
    "expanded buffer": (lambda: _with_buffer(torch.zeros(1).expand(4)), "buffer wide must have its elements in places"),
}


def _with_buffer(tensor: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("wide", tensor)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of nested tensors and lazy modules
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sent_is_refused_on_its_rank_and_told_to_the_others(name: str) -> None:
    make, reason = REFUSED[name]

    def spread(backend: Backend) -> str:
        wrong = backend.rank == 1
        with pytest.raises(InputError if wrong else MismatchError) as told:
            broadcast(make() if wrong else torch.ones(3), backend)
        broadcast(torch.ones(3), backend)
        return str(told.value)

    first, second = run_threads(2, spread)
    assert second.startswith("rank 1: broadcast: ")
    assert reason in second
    assert f"ranks do not agree on their input: rank 0: accepted; rank 1: refused: {second}. Nothing was" in first


def test_a_tensor_of_inference_is_sent_in_that_mode() -> None:
    def spread(backend: Backend) -> list[float]:
        with torch.inference_mode():
            x = torch.full((3,), float(backend.rank))
            broadcast(x, backend, 1)
            return [float(v) for v in x]

    assert run_threads(2, spread) == [[1.0] * 3] * 2


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_names_that_one_rank_alone_has_are_told(name: str) -> None:
    def spread(backend: Backend) -> str:
        model = nn.Sequential(nn.Linear(2, 2))
        if backend.rank == 2:
            layer, last = name.split(".")
            setattr(model.get_submodule(layer), last, None)
        with pytest.raises(MismatchError) as told:
            broadcast(model, backend)
        return str(told.value)

    for message in run_threads(3, spread):
        assert f"ranks do not agree on parameter {name}: ranks 0, 1: float32 " in message
        assert "; rank 2: none. Nothing was exchanged or changed." in message


def test_modules_registered_in_another_order_are_matched_by_name() -> None:
    def spread(backend: Backend) -> list[bytes]:
        model = nn.Module()
        for name in ("a", "b") if backend.rank else ("b", "a"):
            model.register_parameter(name, nn.Parameter(normal(backend.rank, ord(name))))
        broadcast(model, backend)
        return bits([model.get_parameter("a"), model.get_parameter("b")])

    assert run_threads(2, spread) == [bits([normal(0, ord("a")), normal(0, ord("b"))])] * 2


def test_a_model_tied_on_one_rank_alone_is_refused_and_views_shared_alike_are_sent() -> None:
    def spread(backend: Backend) -> None:
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        if backend.rank:
            model.get_submodule("1").weight = model.get_submodule("0").weight
        with pytest.raises(MismatchError, match=r"parameter 1\.weight: rank 0: float32 \(2, 2\); rank 1: none"):
            broadcast(model, backend)
        base = normal(backend.rank)
        broadcast([base[:9], base[5:], base[5:], base.view(-1, 2)[:, 1]], backend)
        assert bits(base) == bits(normal(0))

    run_threads(2, spread)
