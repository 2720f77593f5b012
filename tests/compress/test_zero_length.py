"""Nothing in, nothing out: tensors, lists and buffers without elements."""

from __future__ import annotations

import pytest
import torch

from onebit.compress import SignCodec, pack_signs, unpack_signs
from onebit.compress.kernels import DTYPES
from tests.compress import samples

pytestmark = pytest.mark.parametrize("kernels", samples.KERNELS)
EMPTY = [(0,), (3, 0), (0, 5, 2)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1024, None])
def test_an_empty_tensor_has_an_empty_payload(
    kernels: str, shape: tuple[int, ...], dtype: torch.dtype, block_size: int | None
) -> None:
    codec, x = SignCodec(block_size=block_size, kernels=kernels), torch.empty(shape, dtype=dtype)
    payload = codec.encode(x, torch.empty(0), mask=torch.empty(0, dtype=torch.uint8))
    assert payload.shape == (0,)
    assert payload.dtype == torch.uint8
    assert codec.decode(payload, x) is x
    assert torch.as_tensor(codec.decode(payload, numel=0)).shape == (0,)
    mean = codec.reduce_encode(torch.stack([payload] * 3), torch.empty(0), numel=0)
    assert mean.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_no_signs_pack_to_no_bytes(kernels: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype)
    bits = pack_signs(x, kernels=kernels)
    assert bits.shape == (0,)
    assert unpack_signs(bits, x, kernels=kernels) is x
    assert unpack_signs(bits, numel=0, kernels=kernels).shape == (0,)
    assert unpack_signs(bits, kernels=kernels).shape == (0,)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("block_size", [1024, None])
@pytest.mark.parametrize("bucket_numel", [None, 10])
def test_a_list_without_elements_has_one_empty_layout(
    kernels: str, sizes: list[int], block_size: int | None, bucket_numel: int | None
) -> None:
    codec, xs = SignCodec(block_size=block_size, kernels=kernels), [torch.empty(n) for n in sizes]
    (layout,) = codec.plan(xs, 3, bucket_numel)
    assert (layout.blocks, layout.payload_bytes, layout.padded_numel, layout.numel) == (0, 0, 0, 0)
    payload = codec.encode(xs, torch.empty(0), layout=layout)
    assert payload.numel() == 0
    assert codec.reduce_encode(payload, layout=layout, chunk=2).numel() == 0
    assert codec.decode(payload, xs, layout=layout) is xs


@pytest.mark.parametrize("block_size", [32, None])
def test_empty_tensors_between_others_take_no_room(kernels: str, block_size: int | None) -> None:
    codec = SignCodec(block_size=block_size, kernels=kernels)
    full = [torch.randn(40), torch.randn(1)]
    empty = torch.empty(0)
    spread = [empty, full[0], empty, empty, full[1], empty]
    (dense_layout,), (spread_layout,) = codec.plan(full, 2), codec.plan(spread, 2)
    payload = codec.encode(spread, layout=spread_layout)
    assert samples.same_bytes(payload, codec.encode(full, layout=dense_layout))
    outs = [torch.empty_like(x) for x in spread]
    codec.decode(payload, outs, layout=spread_layout)
    assert outs[4].item() == full[1].item()


def test_a_chunk_of_padding_alone_reduces_to_zero_scales(kernels: str) -> None:
    codec = SignCodec(kernels=kernels)
    (layout,) = codec.plan([5], 4)
    payloads = codec.encode(torch.ones(5), layout=layout).view(4, -1)
    mean = codec.reduce_encode(payloads[3], layout=layout, chunk=3)
    assert not mean.any()
    assert codec.reduce_encode(payloads[3], torch.empty(0), layout=layout, chunk=3).numel() == mean.numel()
