"""The quantizing codecs against their specification in NumPy, and what follows: bounds, means and conservation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebit.compress import BlockOperators, Codec, Fp8Codec, InputError, Int4Codec, Int8Codec, Layout, SignCodec
from onebit.compress.blocks import real_elements
from onebit.compress.kernels import DEVICES, DTYPES, QUANTIZED
from onebit.compress.quantized import QuantizedCodec
from onebit.compress.quantized_reference import QuantizedBlocks, hadamard
from tests.compress import quantized_oracle as oracle
from tests.compress import samples

KERNELS = tuple(name for name in QUANTIZED if DEVICES.get(name, "cpu") == "cpu")
CPU = torch.device("cpu")
UNIT = 2.0**-24  # the relative error of one rounding to fp32


def spec_of(codec: QuantizedCodec) -> oracle.Spec:
    how = codec.quantizer
    return oracle.Spec(how.format, codec.block_size, how.stochastic, how.rotate, how.seed)


def largest_of(codec: QuantizedCodec) -> float:
    return codec.quantizer.largest


@st.composite
def codecs(draw: st.DrawFn, kernels: str | None = None) -> QuantizedCodec:
    options: dict[str, Any] = {"kernels": kernels}
    kind = draw(st.sampled_from((Int8Codec, Int4Codec, Fp8Codec)))
    if kind is Fp8Codec:
        return Fp8Codec(block_size=draw(st.sampled_from((32, 96, 1024))), **options)
    rotate = draw(st.booleans())
    sizes = (32, 64, 1024) if rotate else (32, 96, 1024)
    chosen: QuantizedCodec = kind(
        block_size=draw(st.sampled_from(sizes)),
        rounding=draw(st.sampled_from(("nearest", "stochastic"))),
        rotate=rotate,
        seed=draw(st.sampled_from((0, 1, 2**32 - 1))),
        **options,
    )
    return chosen


class Problem:
    """Tensors in a layout with all that the operators take, drawn at random."""

    def __init__(self, draw: st.DrawFn, kernels: str, finite: bool) -> None:
        self.codec = draw(codecs(kernels))
        self.dtype = draw(st.sampled_from(DTYPES))
        numels = draw(st.lists(samples.numels(), min_size=1, max_size=3))
        self.xs = [draw(samples.any_tensor(n, self.dtype, finite)) for n in numels]
        self.chunks = draw(st.integers(1, 3))
        self.layout: Layout = self.codec.plan(self.xs, self.chunks)[0]
        kept: Tensor | None = draw(samples.any_tensor(self.layout.padded_numel, torch.float32, finite))
        self.residual = kept if draw(st.booleans()) else None
        self.mask = samples.mask_of(self.layout, draw(st.integers(0, 9))) if draw(st.booleans()) else None
        self.shape = (self.layout.blocks, self.codec.block_size)

    @property
    def real(self) -> oracle.Bools:
        real: oracle.Bools = real_elements(self.layout, self.layout.segments, self.layout.blocks, CPU).numpy()
        return real

    @property
    def live(self) -> oracle.Bools:
        if self.mask is None:
            return self.real
        dead: oracle.Bools = np.unpackbits(self.mask.numpy(), bitorder="little").reshape(self.shape).astype(bool)
        return self.real & ~dead

    @property
    def x(self) -> oracle.Floats:
        flat = np.zeros(self.layout.padded_numel, np.float32)
        for s in self.layout.segments:
            flat[self.layout.residual_span(s)] = self.xs[s.tensor][s.offset : s.offset + s.numel].float().numpy()
        return flat.reshape(self.shape)

    def blocks(self, padded: Tensor | None) -> oracle.Floats | None:
        return None if padded is None else padded.numpy().reshape(self.shape).copy()

    def __repr__(self) -> str:
        return f"{self.codec}, {self.dtype}, {self.chunks} chunks, xs {self.xs}, {self.residual}, mask {self.mask}"


@st.composite
def problems(draw: st.DrawFn, kernels: str = "reference", finite: bool = False) -> Problem:
    return Problem(draw, kernels, finite)


def same(a: oracle.Floats, b: oracle.Floats) -> bool:
    """The same bits, but for those of NaN."""
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(a[~nan].view(np.uint32), b[~nan].view(np.uint32))


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=60)
@given(data=st.data())
def test_payloads_residuals_and_what_is_decoded_are_the_specification_bit_for_bit(
    kernels: str, data: st.DataObject
) -> None:
    p = data.draw(problems(kernels))
    spec, before = spec_of(p.codec), p.blocks(p.residual)
    payload = p.codec.encode(p.xs, p.residual, layout=p.layout, mask=p.mask)
    if not p.layout.blocks:
        assert payload.numel() == 0
        return
    expected = oracle.encode(p.x, before, p.live, p.real, spec)
    assert payload.numpy().tobytes() == oracle.payloads(expected, p.layout).tobytes()
    if p.residual is not None:
        now = p.blocks(p.residual)
        assert now is not None
        assert same(now, expected.residual)
    outs = [torch.full_like(x, 7.0) for x in p.xs]
    p.codec.decode(payload, outs, layout=p.layout, mask=p.mask)
    said = np.where(p.live, oracle.decode(expected.codes, expected.scales, spec), np.float32(0)).reshape(-1)
    for s in p.layout.segments:
        wanted = torch.from_numpy(said[p.layout.residual_span(s)].copy()).to(p.dtype)
        assert torch.equal(outs[s.tensor][s.offset : s.offset + s.numel].nan_to_num(9.0), wanted.nan_to_num(9.0))


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=40)
@given(data=st.data())
def test_the_mean_of_several_payloads_is_the_specification_bit_for_bit(kernels: str, data: st.DataObject) -> None:
    p = data.draw(problems(kernels))
    ranks, chunk = data.draw(st.integers(1, 5)), data.draw(st.integers(0, p.chunks - 1))
    if not p.layout.blocks:
        return
    spec = spec_of(p.codec)
    rows = []
    for rank in range(ranks):
        xs = [x * (rank - 1.5) for x in p.xs]
        rows.append(p.codec.encode(xs, None, layout=p.layout).view(p.chunks, -1)[chunk])
    payloads = torch.stack(rows)
    part = slice(chunk * p.layout.chunk_blocks, (chunk + 1) * p.layout.chunk_blocks)
    residual = None if p.residual is None else p.residual.view(p.shape)[part].reshape(-1).clone()
    before = None if residual is None else residual.numpy().reshape(-1, spec.block_size).copy()
    out = p.codec.reduce_encode(payloads, residual, layout=p.layout, chunk=chunk, mask=p.mask)
    mean = oracle.mean(*oracle.taken_apart(payloads.numpy(), p.layout, spec), spec)
    expected = oracle.encode(mean, before, p.live[part], p.real[part], spec)
    assert out.numpy().tobytes() == oracle.payloads(expected, p.layout).tobytes()
    if residual is not None:
        assert same(residual.numpy().reshape(-1, spec.block_size), expected.residual)


@settings(max_examples=60)
@given(data=st.data())
def test_what_is_not_said_is_kept(data: st.DataObject) -> None:
    p = data.draw(problems(finite=True))
    if p.residual is None or not p.layout.blocks:
        return
    before = p.blocks(p.residual)
    payload = p.codec.encode(p.xs, p.residual, layout=p.layout, mask=p.mask)
    expected = oracle.taken_apart(payload.numpy().reshape(p.chunks, -1), p.layout, spec_of(p.codec))
    codes, scales = expected[0].reshape(len(p.real), -1), expected[1].reshape(-1)
    after = p.blocks(p.residual)
    assert before is not None
    assert after is not None
    finite = np.isfinite(scales)[:, None] & p.live  # a transform may overflow what is finite
    with np.errstate(all="ignore"):
        said = oracle.decode(codes, scales, spec_of(p.codec)).astype(np.float64)
        old, new = p.x.astype(np.float64) + before, said + after
        held = np.abs(p.x) + np.abs(before) + np.abs(said) + np.abs(after)
    # Two roundings: of x + residual, and of what remains of it; both of numbers no larger than what is held.
    assert np.all(np.abs(old - new)[finite] <= 2 * UNIT * held[finite] + 2.0**-149)
    assert same(after[~p.real], before[~p.real]), "padding was touched"


@settings(max_examples=60)
@given(data=st.data())
def test_a_mean_that_is_not_taken_is_put_back(data: st.DataObject) -> None:
    p = data.draw(problems(finite=True))
    if not p.layout.blocks:
        return
    payloads = p.codec.encode([x.clamp(-9, 9) for x in p.xs], None, layout=p.layout).view(p.chunks, -1)[:1]
    residual = torch.randn(p.layout.chunk_numel, generator=torch.Generator().manual_seed(1))
    before, operators = residual.clone(), p.codec.unchecked(CPU)
    out = p.codec.reduce_encode(payloads, residual, layout=p.layout, mask=p.mask)
    encoded = residual.clone()
    operators.undo_reduce(payloads, residual, p.mask, out, p.layout, 0, keep=torch.tensor(True))
    assert torch.equal(residual, encoded)
    operators.undo_reduce(payloads, residual, p.mask, out, p.layout, 0)
    live = torch.from_numpy(p.live[: p.layout.chunk_blocks].reshape(-1))
    # Sums of three numbers of at most 16, and of a transform of them, each off by a few units of that.
    assert float((residual - before)[live].abs().max() if live.any() else 0.0) <= 64 * 16 * UNIT


@pytest.mark.parametrize("kind", [Int8Codec, Int4Codec])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), size=st.sampled_from((32, 256)), spread=st.integers(0, 30))
def test_an_integer_is_off_by_half_a_step_at_most_and_drawn_by_less_than_one(
    kind: type[Int8Codec | Int4Codec], seed: int, size: int, spread: int
) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * 2.0 ** -(torch.arange(4096) % (spread + 1))
    for rounding, steps in (("nearest", 0.5), ("stochastic", 1.0)):
        codec = kind(block_size=size, rounding=rounding)  # type: ignore[arg-type]
        decoded = codec.decode(codec.encode(x), numel=x.numel())
        assert isinstance(decoded, Tensor)
        step = x.view(-1, size).abs().amax(1, keepdim=True).double() / largest_of(codec)
        # Scale, factor and product are rounded to fp32: three units of M steps at most.
        allowed = step * (steps + 3 * 2 * largest_of(codec) * UNIT)
        assert bool(((decoded - x).view(-1, size).abs().double() <= allowed).all())


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), size=st.sampled_from((32, 256)), spread=st.integers(0, 30))
def test_e4m3_is_off_by_a_sixteenth_at_most_or_half_the_smallest_step(seed: int, size: int, spread: int) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * 2.0 ** -(torch.arange(4096) % (spread + 1))
    codec = Fp8Codec(block_size=size)
    decoded = codec.decode(codec.encode(x), numel=x.numel())
    assert isinstance(decoded, Tensor)
    scale = x.view(-1, size).abs().amax(1, keepdim=True).double() / 448
    rows = x.view(-1, size).double()
    # Half a unit in the last of 4 significant bits; below s·2⁻⁶ half of s·2⁻⁹; and a few roundings to fp32.
    allowed = torch.maximum(rows.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)
    assert bool(((decoded.view(-1, size).double() - rows).abs() <= allowed).all())


SEEDS = 2000


def test_stochastic_rounding_is_right_on_average_over_seeds() -> None:
    """By Hoeffding: errors of a width of one step, 32 of them; chance of a false alarm below 64·exp(-2·n·t²) < 1e-9."""
    x = torch.linspace(-0.93, 1.0, 32)
    step, t = 1.0 / 7, math.sqrt(math.log(64 / 1e-9) / (2 * SEEDS))
    total = torch.zeros(32, dtype=torch.float64)
    for seed in range(SEEDS):
        codec = Int4Codec(block_size=32, rounding="stochastic", seed=seed, kernels="reference")
        total += codec.decode(codec.encode(x), numel=32).double()  # type: ignore[union-attr]
    off = (total / SEEDS - x).abs() / step
    nearest = Int4Codec(block_size=32, kernels="reference")
    biased = (nearest.decode(nearest.encode(x), numel=32) - x).abs() / step  # type: ignore[operator]
    assert float(off.max()) <= t < 0.1 < float(biased.max())


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("kind", [Int8Codec, Int4Codec])
def test_stochastic_rounding_is_right_on_average_over_elements(kind: type[Int8Codec | Int4Codec], rotate: bool) -> None:
    """All that is rounded lies 0.3 steps above an integer, by which it is off in one direction to the nearest."""
    generator, codec = torch.Generator().manual_seed(0), kind(block_size=256, rounding="stochastic", rotate=rotate)
    steps = torch.rand(2048, 1, generator=generator) + 1  # of each block: equal blocks would be rounded alike
    q = torch.randint(1, 6, (2048, 256), generator=generator) + 0.3
    q[:, 0] = codec.quantizer.largest
    values = hadamard(q * steps) if rotate else q * steps
    decoded = codec.decode(codec.encode(values), numel=values.numel())
    assert isinstance(decoded, Tensor)
    said = hadamard(decoded.view(2048, 256)) if rotate else decoded.view(2048, 256)
    off = float((said / steps - q).double().mean())
    # Hoeffding, of independent draws from an interval of one step; false alarms: below 1e-9. Rounding adds some 1e-6.
    assert abs(off) <= math.sqrt(math.log(2 / 1e-9) / (2 * q.numel())) + 1e-5


def test_another_seed_draws_otherwise_and_the_same_one_alike() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    one, again, other = (Int8Codec(rounding="stochastic", seed=seed).encode(x) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    differing = float((one[:4096] != other[:4096]).float().mean())
    assert 0.2 < differing < 0.5  # of two draws with chances p and 1 - p, averaged over p: a third


def test_equal_numbers_of_a_block_are_not_all_rounded_alike() -> None:
    codec = Int4Codec(block_size=1024, rounding="stochastic")
    x = torch.full((1024,), 3.5)
    x[0] = 7.0
    said = codec.decode(codec.encode(x), numel=1024)
    assert isinstance(said, Tensor)
    assert set(said[1:].tolist()) == {3.0, 4.0}
    assert 400 < int((said == 3.0).sum()) < 620  # 5 standard deviations of a fair coin are 80


@pytest.mark.parametrize("kind", [Int8Codec, Int4Codec])
def test_rotation_spreads_an_outlier_so_that_the_others_keep_their_digits(kind: type[Int8Codec | Int4Codec]) -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(4))
    x[100] = 50.0
    errors = {}
    for rotate in (False, True):
        codec = kind(rotate=rotate)
        said = codec.decode(codec.encode(x), numel=1024)
        assert isinstance(said, Tensor)
        errors[rotate] = float((said - x).norm())
    assert errors[True] < 0.5 * errors[False]


def hadamard_matrix(size: int) -> npt.NDArray[np.float64]:
    """(size, size): element (i, j) is -1 where i and j have an odd number of ones in common, else 1."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", [Int8Codec, Int4Codec])
def test_what_a_rotated_block_says_is_exact_but_for_one_rounding(
    kind: type[Int8Codec | Int4Codec], kernels: str
) -> None:
    """Where 1/√B is a power of two: the sums in float64, which has room for all of their digits times the scale's."""
    for size in (64, 256, 1024, 4096):
        codec = kind(block_size=size, rotate=True, kernels=kernels)
        payload = codec.encode(torch.randn(3 * size, generator=torch.Generator().manual_seed(size)))
        codes, scales = oracle.taken_apart(payload.numpy()[None], codec.plan([3 * size])[0], spec_of(codec))
        q = oracle.values(codes[0], spec_of(codec)).astype(np.float64)
        exact = q @ hadamard_matrix(size) * (scales[0].astype(np.float64) / math.sqrt(size))[:, None]
        said = codec.decode(payload, numel=3 * size)
        assert isinstance(said, Tensor)
        assert said.tolist() == exact.astype(np.float32).flatten().tolist()


EVERY: list[Callable[[], QuantizedCodec]] = [
    lambda: Int8Codec(block_size=64),
    lambda: Int4Codec(block_size=64, rounding="stochastic", rotate=True),
    lambda: Fp8Codec(block_size=64),
]


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("bad", samples.NON_FINITE)
def test_a_number_that_is_not_finite_makes_its_block_nan_and_leaves_its_residual(
    make: Callable[[], QuantizedCodec], bad: float
) -> None:
    codec, x, residual = make(), torch.ones(200), torch.full((200,), 0.25)
    x[70] = bad
    payload = codec.encode(x, residual)
    said = codec.decode(payload, numel=200)
    assert isinstance(said, Tensor)
    assert said.isnan().tolist() == [64 <= i < 128 for i in range(200)]
    assert residual[64:128].eq(0.25).all()
    assert not bool(codec.all_finite(payload, codec.plan([200])[0]))
    assert bool(codec.all_finite(codec.encode(torch.ones(200)), codec.plan([200])[0]))


@pytest.mark.parametrize("make", EVERY)
def test_a_block_of_tiny_numbers_says_nothing_and_keeps_all(make: Callable[[], QuantizedCodec]) -> None:
    codec, x, residual = make(), torch.full((64,), 2.0**-120), torch.zeros(64)
    said = codec.decode(codec.encode(x, residual), numel=64)
    assert isinstance(said, Tensor)
    assert said.eq(0).all()
    assert torch.equal(residual, x)


@pytest.mark.parametrize("numel", [1, 63, 64, 1000])
def test_a_payload_has_the_bytes_of_its_formula(numel: int) -> None:
    for codec, bits in ((SignCodec(block_size=64), 1), (Int4Codec(block_size=64), 4), (Fp8Codec(block_size=64), 8)):
        blocks = -(-numel // 64)
        codes, scales = 64 * bits // 8 * blocks, 4 * blocks
        assert codec.encode(torch.ones(numel)).numel() == -(-codes // 16) * 16 + -(-scales // 16) * 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int8Codec(block_size=48), "Int8Codec: block_size must be a positive multiple of 32"),
        (lambda: Int4Codec(block_size=None), "Int4Codec: block_size must be .* got None"),  # type: ignore[arg-type]
        (lambda: Int8Codec(block_size=96, rotate=True), "power of two from 32 to 4096, got 96"),
        (lambda: Int8Codec(block_size=8192, rotate=True), "power of two from 32 to 4096, got 8192"),
        (lambda: Int8Codec(rounding="up"), "rounding must be 'nearest' or 'stochastic', got 'up'"),  # type: ignore[arg-type]
        (lambda: Int8Codec(rotate=1), "rotate must be a bool, got 1"),  # type: ignore[arg-type]
        (lambda: Int8Codec(seed=-1), "seed must be an int of 32 bits"),
        (lambda: Int8Codec(seed=1 << 32), "seed must be an int of 32 bits"),
        (lambda: Fp8Codec(error_feedback="no"), "error_feedback must be a bool, got 'no'"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_option_is_named(make: Callable[[], Codec], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_layout_of_another_codec_is_refused() -> None:
    (layout,) = SignCodec().plan([2048])
    with pytest.raises(InputError, match="1 bits per element, Int8Codec takes 8"):
        Int8Codec().encode([torch.ones(2048)], layout=layout)


def test_codecs_are_equal_by_what_they_write() -> None:
    assert Int8Codec() == Int8Codec(kernels="reference")
    assert len({Int8Codec(), Int4Codec(), Fp8Codec(), Int8Codec(seed=1), Int8Codec(error_feedback=False)}) == 5


def test_the_operators_are_those_of_a_format_of_blocks() -> None:
    """What `BlockOperators` makes of the reference's format is what the codec gives."""
    codec, x = Int8Codec(block_size=64), torch.randn(1000, generator=torch.Generator().manual_seed(2))
    (layout,) = codec.plan([1000])
    out = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    BlockOperators(QuantizedBlocks(codec.quantizer)).encode([x], None, None, out, layout)
    assert torch.equal(out, codec.encode(x))
