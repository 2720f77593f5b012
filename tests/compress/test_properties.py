"""What holds for every shape, dtype, block size, mask and value, sought by Hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onebit.compress import Layout, SignCodec, pack_signs, unpack_signs
from onebit.compress.kernels import DTYPES
from tests.compress import oracle, samples

dtypes = st.sampled_from(DTYPES)


class Problem:
    """A list of tensors with everything that the operators take, drawn at random."""

    def __init__(self, draw: st.DrawFn, finite: bool) -> None:
        self.codec = draw(samples.codecs())
        self.dtype = draw(dtypes)
        self.numels = draw(st.lists(samples.numels(), min_size=1, max_size=4))
        self.chunks = draw(st.integers(1, 4))
        self.xs = [draw(samples.any_tensor(n, self.dtype, finite)) for n in self.numels]
        self.layout: Layout = self.codec.plan(self.xs, self.chunks)[0]
        self.residual = draw(samples.any_tensor(self.layout.padded_numel, torch.float32, finite))
        self.mask = samples.mask_of(self.layout, draw(st.integers(0, 9))) if draw(st.booleans()) else None
        self.ranks = draw(st.integers(1, 8))

    def with_kernels(self, kernels: str) -> SignCodec:
        return SignCodec(block_size=self.codec.block_size, scale=self.codec.scale, kernels=kernels)

    @property
    def shape(self) -> oracle.Geometry:
        return oracle.geometry(self.numels, self.codec.block_size, self.chunks)

    @property
    def live(self) -> Tensor:
        """(padded,) bool: real and not masked."""
        live = torch.zeros(self.layout.padded_numel, dtype=torch.bool)
        for s in self.layout.segments:
            live[self.layout.residual_span(s)] = True
        if self.mask is not None:
            live &= ~torch.from_numpy(oracle.unpack(self.mask.numpy()))
        return live

    def padded(self, xs: list[Tensor]) -> Tensor:
        """Tensors as fp64 in the layout's order, padding 0."""
        flat = torch.zeros(self.layout.padded_numel, dtype=torch.float64)
        for s in self.layout.segments:
            flat[self.layout.residual_span(s)] = xs[s.tensor][s.offset : s.offset + s.numel].double()
        return flat

    def __repr__(self) -> str:
        return (
            f"{self.codec}, {self.dtype}, numels {self.numels}, {self.chunks} chunks, {self.ranks} ranks, "
            f"{'masked' if self.mask is not None else 'no mask'}, xs {self.xs}, residual {self.residual}"
        )


problems = st.composite(lambda draw: Problem(draw, finite=False))()
finite_problems = st.composite(lambda draw: Problem(draw, finite=True))()


@given(problems)
def test_all_implementations_write_the_same_bytes(problem: Problem) -> None:
    def run(kernels: str) -> list[bytes]:
        codec, layout, mask = problem.with_kernels(kernels), problem.layout, problem.mask
        residual, server = problem.residual.clone(), problem.residual[: layout.chunk_numel].clone()
        payload = codec.encode(problem.xs, residual, layout=layout, mask=mask)
        sent = payload.view(problem.chunks, -1)
        others = samples.random_payloads(codec, layout, problem.ranks) if layout.blocks else sent
        mean = codec.reduce_encode(torch.cat([sent[:1], others]), server, layout=layout, mask=mask)
        outs = [torch.zeros_like(x) for x in problem.xs]
        codec.decode(payload, outs, layout=layout, mask=mask)
        signs = [unpack_signs(pack_signs(x, kernels=kernels), x.clone(), kernels=kernels) for x in problem.xs]
        return [samples.as_bytes(t) for t in (payload, residual, mean, server, *outs, *signs)]

    expected = run("reference")
    for kernels in samples.KERNELS:
        assert run(kernels) == expected


@given(problems)
def test_encode_gives_what_the_oracle_says(problem: Problem) -> None:
    shape, residual = problem.shape, problem.residual.clone()
    expected = oracle.encode(
        samples.arrays(problem.xs),
        samples.blocks(residual, shape),
        samples.mask_blocks(problem.mask, shape),
        shape,
        problem.codec.scale,
    )
    payload = problem.codec.encode(problem.xs, residual, layout=problem.layout, mask=problem.mask)
    bits, scales = oracle.parse(payload.numpy(), shape, problem.chunks)
    expected.check_payload(bits, scales)
    expected.check_residual(samples.blocks(residual, shape), scales)


@given(problems, st.data())
def test_reduce_encode_gives_what_the_oracle_says(problem: Problem, data: st.DataObject) -> None:
    shape, layout = problem.shape, problem.layout
    if not layout.blocks:
        return
    chunk = data.draw(st.integers(0, problem.chunks - 1))
    payloads = samples.random_payloads(problem.codec, layout, problem.ranks, seed=problem.ranks)
    residual = problem.residual[: layout.chunk_numel].clone()
    dead = samples.mask_blocks(problem.mask, shape)
    expected = oracle.reduce_encode(
        list(payloads.numpy()),
        samples.blocks(residual, shape),
        None if dead is None else dead[chunk * layout.chunk_blocks : (chunk + 1) * layout.chunk_blocks],
        shape,
        chunk,
        problem.codec.scale,
    )
    payload = problem.codec.reduce_encode(payloads, residual, layout=layout, chunk=chunk, mask=problem.mask)
    bits, scales = oracle.parse(payload.numpy(), shape, 1)
    expected.check_payload(bits, scales)
    expected.check_residual(samples.blocks(residual, shape), scales)


@given(finite_problems)
def test_input_plus_old_residual_is_output_plus_new_residual(problem: Problem) -> None:
    layout, live = problem.layout, problem.live
    old, new = problem.residual.double() * live, problem.residual.clone()
    payload = problem.codec.encode(problem.xs, new, layout=layout, mask=problem.mask)
    outs = [torch.zeros(n) for n in problem.numels]
    problem.codec.decode(payload, outs, layout=layout, mask=problem.mask)
    said = problem.padded(outs)
    spoilt = said.isnan()  # c overflowed fp32
    x = problem.padded(problem.xs) * live
    lost = torch.where(spoilt | ~live, 0.0, x + old - said - new.double())
    # c = x + residual is rounded once and so is c - s·sign(c): half a unit in the last place each. Sums and differences
    # of fp32 numbers are never rounded among the denormal ones.
    allowed = oracle.UNIT * ((x + old).abs() + (x + old).abs() + said.abs())
    assert (lost.abs() <= torch.where(spoilt, torch.inf, allowed)).all()
    assert not said[~live & ~spoilt].any(), "masked elements decode to 0"


@given(finite_problems)
def test_the_mean_scale_never_makes_the_error_larger_than_the_input(problem: Problem) -> None:
    codec = SignCodec(block_size=problem.codec.block_size)
    residual = torch.zeros(problem.layout.padded_numel)
    codec.encode(problem.xs, residual, layout=problem.layout, mask=problem.mask)
    squares = (problem.padded(problem.xs) * problem.live).square()
    errors = residual.double().square()
    for blocks in scale_groups(problem):
        members = [slice(b * problem.layout.block_size, (b + 1) * problem.layout.block_size) for b in blocks]
        before, after = (float(sum(t[m].sum() for m in members)) for t in (squares, errors))
        count = sum(int(problem.live[m].sum()) for m in members)
        # Σ(|c| - s)² = Σc² - n·m² + n·(s - m)² with the exact mean m, and n·m² ≥ Σc²/n. The scale is off by at most 40
        # roundings and a denormal, and each residual is rounded once, to 2⁻²⁴ of at most |c| + s.
        off = 40 * oracle.UNIT
        floor = count * oracle.SMALLEST**2
        assert after <= before * (1 - 1 / count + off**2 + 4 * oracle.UNIT) + 2 * floor if count else after == 0


def scale_groups(problem: Problem) -> list[list[int]]:
    blocks = problem.shape.blocks
    if problem.codec.block_size is not None:
        return [[b] for b in range(len(blocks))]
    return [
        [b for b, block in enumerate(blocks) if block.tensor == t and block.numel] for t in range(len(problem.numels))
    ]


@given(samples.numels(), dtypes, dtypes, st.data())
def test_signs_survive_packing(numel: int, dtype: torch.dtype, out_dtype: torch.dtype, data: st.DataObject) -> None:
    x = data.draw(samples.any_tensor(numel, dtype))
    bits = pack_signs(x)
    np.testing.assert_array_equal(np.unpackbits(bits.numpy(), bitorder="little")[:numel], (x >= 0).numpy())
    back = unpack_signs(bits, torch.empty(numel, dtype=out_dtype))
    assert torch.equal(back, torch.where(x >= 0, 1.0, -1.0).to(out_dtype))


@given(samples.codecs(), samples.numels(), dtypes, st.data())
def test_decode_is_the_sign_times_the_scale_in_any_dtype(
    codec: SignCodec, numel: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    x = data.draw(samples.any_tensor(numel, torch.float32))
    payload = codec.encode(x)
    exact = codec.decode(payload, numel=numel)
    assert isinstance(exact, Tensor)
    assert torch.equal(exact.signbit(), ~(x >= 0) | exact.signbit() & exact.isnan())
    out = codec.decode(payload, torch.empty(numel, dtype=dtype))
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, exact.to(dtype), rtol=0, atol=0, equal_nan=True)


@given(samples.codecs(), st.lists(st.integers(0, 5), max_size=4), dtypes, st.data())
def test_the_shape_of_a_tensor_does_not_matter(
    codec: SignCodec, shape: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    numel = int(np.prod(shape))
    x = data.draw(samples.any_tensor(numel, dtype))
    payload = codec.encode(x.view(shape))
    assert samples.same_bytes(payload, codec.encode(x))
    out = torch.empty(shape)
    assert codec.decode(payload, out) is out
    flat = codec.decode(payload, numel=numel)
    assert isinstance(flat, Tensor)
    assert samples.same_bytes(out.view(-1), flat)


@pytest.mark.parametrize("kernels", samples.KERNELS)
@given(seed=st.integers(0, 999), ranks=st.integers(1, 8))
def test_the_mean_is_within_rounding_of_the_mean_in_float64(kernels: str, seed: int, ranks: int) -> None:
    codec = SignCodec(block_size=64, kernels=kernels)
    xs = torch.randn(ranks, 500, generator=torch.Generator().manual_seed(seed))
    payloads = torch.stack([codec.encode(x) for x in xs])
    decoded = torch.stack([torch.as_tensor(codec.decode(p, numel=500)) for p in payloads]).double()
    residual = torch.zeros(500)
    said = codec.decode(codec.reduce_encode(payloads, residual, numel=500), numel=500)
    assert isinstance(said, Tensor)
    # Per rank a division and an addition, then the residual's own rounding: each half a unit in the last place of a
    # number no larger than the sum of the scales.
    allowed = (2 * ranks + 1) * oracle.UNIT * decoded.abs().sum(0)
    assert ((said.double() + residual.double() - decoded.mean(0)).abs() <= allowed).all()
