"""What is not finite spoils the numbers that share its scale, reaches everybody, and counts for nothing if masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.compress import SignCodec
from tests.compress import oracle, samples
from tests.compress.samples import same_bytes as same_bits


@pytest.mark.parametrize("kernels", samples.KERNELS)
@pytest.mark.parametrize("poison", samples.NON_FINITE)
@pytest.mark.parametrize("scale", ["mean", "rms"])
def test_a_non_finite_element_spoils_its_block_and_no_other(kernels: str, poison: float, scale: str) -> None:
    codec = SignCodec(block_size=64, scale=scale, kernels=kernels)
    x, residual = torch.randn(200), torch.randn(200)
    x[70] = poison
    before = residual.clone()
    back = codec.decode(codec.encode(x, residual), numel=200)
    assert isinstance(back, Tensor)
    assert back.isnan().nonzero().view(-1).tolist() == list(range(64, 128))
    assert same_bits(residual[64:128], before[64:128])
    assert not torch.equal(residual[:64], before[:64])
    assert not torch.equal(residual[128:], before[128:])


@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_with_a_scale_per_tensor_a_non_finite_element_spoils_its_tensor_and_no_other(kernels: str) -> None:
    codec = SignCodec(block_size=None, kernels=kernels)
    xs = [torch.randn(3000), torch.randn(3000)]
    (layout,) = codec.plan(xs, 2)
    residual = samples.residual_of(layout)
    xs[0][2999] = torch.nan
    before = residual.clone()
    outs = [torch.zeros(3000), torch.zeros(3000)]
    codec.decode(codec.encode(xs, residual, layout=layout), outs, layout=layout)
    assert outs[0].isnan().all()
    assert outs[1].isfinite().all()
    for s in layout.segments:
        unchanged = same_bits(residual[layout.residual_span(s)], before[layout.residual_span(s)])
        assert unchanged == (s.tensor == 0)


@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_a_nan_in_the_residual_or_in_one_ranks_scale_reaches_everybody(kernels: str) -> None:
    codec = SignCodec(kernels=kernels)
    residual = torch.zeros(2000)
    residual[1500] = torch.nan
    poisoned = codec.encode(torch.ones(2000), residual)
    clean = codec.encode(torch.ones(2000))
    server = torch.zeros(2000)
    mean = codec.reduce_encode(torch.stack([clean, poisoned, clean]), server, numel=2000)
    back = codec.decode(mean, numel=2000)
    assert isinstance(back, Tensor)
    assert torch.equal(back.isnan(), torch.arange(2000) >= 1024)
    assert not server.any()


@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_a_sum_of_finite_values_that_overflows_counts_as_non_finite(kernels: str) -> None:
    largest = torch.finfo(torch.float32).max
    residual = torch.full((3,), largest)
    back = SignCodec(kernels=kernels).decode(SignCodec(kernels=kernels).encode(residual.clone(), residual), numel=3)
    assert isinstance(back, Tensor)
    assert back.isnan().all()
    assert residual.tolist() == [largest] * 3


@pytest.mark.parametrize("kernels", samples.KERNELS)
@pytest.mark.parametrize("poison", samples.NON_FINITE)
def test_what_is_masked_counts_for_nothing_even_if_it_is_not_finite(kernels: str, poison: float) -> None:
    codec = SignCodec(block_size=32, kernels=kernels)
    x, residual = torch.ones(96), torch.ones(96)
    mask = torch.from_numpy(np.packbits(np.arange(96) % 3 == 0, bitorder="little"))
    mask[4:8] = 0xFF  # the second block, whole
    dead = torch.from_numpy(oracle.unpack(mask.numpy()))
    x[dead] = poison
    residual[dead] = poison
    payload = codec.encode(x, residual, mask=mask)
    assert oracle.parse(payload.numpy(), oracle.geometry([96], 32), 1)[1].tolist() == [2.0, 0.0, 2.0]
    back = codec.decode(payload, numel=96, mask=mask)
    assert isinstance(back, Tensor)
    assert torch.equal(back, torch.where(dead, 0.0, 2.0))
    assert not residual.any(), "masked elements hold no residual, the others are said exactly"
