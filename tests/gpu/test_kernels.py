"""The CUDA kernels give the bytes of the CPU kernels, which other tests compare with an oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from onebit.compress import Layout, SignCodec, pack_signs, unpack_signs
from onebit.compress.gpu import operators

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [[1], [7], [1000, 3], [5000, 1, 33, 0, 2048], [4096 * 3 + 5]]
WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def samples(sizes: list[int], dtype: torch.dtype, special: bool, unaligned: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The same values on the CPU and on the GPU; unaligned: starting one element after an aligned address."""
    on_cpu, on_gpu = [], []
    for size in sizes:
        x = torch.randn(size).to(dtype)
        if special and size > 3:
            x[::3] = 0
            x[1] = -0.0
            x[2] = 1e-40
            if dtype != torch.float16:
                x[3:900] = 3e38  # their sum overflows fp32
            if size > 2000:
                x[1500] = float("nan")
            if size > 4999:
                x[4000] = float("-inf")
        on_cpu.append(x)
        memory = torch.empty(size + 1, dtype=dtype, device="cuda")
        on_gpu.append(memory[unaligned : size + unaligned].copy_(x))
    return on_cpu, on_gpu


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    b = b.cpu()
    if a.dtype == torch.uint8:
        return torch.equal(a, b)
    return torch.equal(a.view(WORDS[a.dtype]), b.view(WORDS[b.dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", ["mean", "rms"])
@pytest.mark.parametrize("block_size", [1024, 32, 96, 2048, None])
def test_bytes_residuals_and_values_are_those_of_the_cpu(
    block_size: int | None, scale: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    cpu = SignCodec(block_size=block_size, scale=scale)  # type: ignore[arg-type]
    assert cpu.kernels_on("cuda") == "gpu"
    for sizes, chunks, masked, special, unaligned in itertools.product(
        SIZES, (1, 3), (False, True), (False, True), (False, True)
    ):
        (layout,) = cpu.plan(sizes, chunks)
        case = f"{sizes} in {chunks} chunks, masked {masked}, special {special}, unaligned {unaligned}"
        x, x_gpu = samples(sizes, dtype, special, unaligned)
        mask = torch.randint(0, 256, (layout.padded_numel // 8,), dtype=torch.uint8) if masked else None
        mask_gpu = None if mask is None else mask.cuda()

        residual = torch.randn(layout.padded_numel)
        residual_gpu = residual.cuda()
        payload = cpu.encode(x, residual, layout=layout, mask=mask)
        payload_gpu = cpu.encode(x_gpu, residual_gpu, layout=layout, mask=mask_gpu)
        assert same(payload, payload_gpu), case
        assert same(residual, residual_gpu), case

        values, values_gpu = [torch.empty_like(v) for v in x], [torch.full_like(v, 7) for v in x_gpu]
        cpu.decode(payload, values, layout=layout, mask=mask)
        cpu.decode(payload_gpu, values_gpu, layout=layout, mask=mask_gpu)
        assert all(map(same, values, values_gpu)), case

        for chunk in range(chunks):
            check_reduce(cpu, layout, chunk, x, payload, mask)


def check_reduce(
    codec: SignCodec, layout: Layout, chunk: int, x: list[Tensor], payload: Tensor, mask: Tensor | None
) -> None:
    others = [codec.encode([v * factor for v in x], layout=layout) for factor in (2.0, -0.3)]
    payloads = torch.stack([p.view(layout.chunks, -1)[chunk] for p in (payload, *others)])
    residual = torch.randn(layout.chunk_numel)
    residual_gpu = residual.cuda()
    mask_gpu = None if mask is None else mask.cuda()
    mean = codec.reduce_encode(payloads, residual, layout=layout, chunk=chunk, mask=mask)
    mean_gpu = codec.reduce_encode(payloads.cuda(), residual_gpu, layout=layout, chunk=chunk, mask=mask_gpu)
    assert same(mean, mean_gpu)
    assert same(residual, residual_gpu)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8, 16])
def test_the_mean_of_any_number_of_payloads_is_that_of_the_cpu(ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    codec = SignCodec()
    payloads = torch.stack([codec.encode(torch.randn(5000, generator=generator)) for _ in range(ranks)])
    residual = torch.randn(5000, generator=generator)
    residual_gpu = residual.cuda()
    assert same(
        codec.reduce_encode(payloads, residual, numel=5000),
        codec.reduce_encode(payloads.cuda(), residual_gpu, numel=5000),
    )
    assert same(residual, residual_gpu)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16])
def test_the_mean_is_that_of_the_cpu_whatever_the_scales(ranks: int) -> None:
    """Scales of any bits, so that a share is rounded, subnormal, too large, infinite and NaN."""
    generator = torch.Generator().manual_seed(ranks)
    codec, numel = SignCodec(), 400 * 1024
    (layout,) = codec.plan([numel])
    payloads = torch.randint(0, 256, (ranks, layout.payload_bytes), dtype=torch.uint8, generator=generator)
    scales = payloads[:, layout.bits_bytes : layout.bits_bytes + 4 * layout.blocks].view(torch.int32)
    scales.bitwise_and_(0x7FFFFFFF)  # none is negative
    for block, special in enumerate((0, 1, 0x007FFFFF, 0x00800001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000)):
        scales[:, block] = special
        scales[0, 10 + block] = special
    residual = torch.zeros(numel)
    residual_there = residual.to(DEVICE, copy=True)
    mean_there = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=DEVICE)
    operators.reduce_encode(payloads.to(DEVICE), residual_there, None, mean_there, layout, 0, False)
    assert same(codec.reduce_encode(payloads, residual, layout=layout), mean_there)
    assert same(residual, residual_there)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1000, 100_001])
def test_packed_signs_are_those_of_the_cpu(numel: int, dtype: torch.dtype) -> None:
    x = torch.randn(numel).to(dtype)
    bits = pack_signs(x)
    assert same(bits, pack_signs(x.cuda()))
    signs = unpack_signs(bits.cuda(), torch.empty(numel, dtype=dtype, device="cuda"))
    assert same(unpack_signs(bits, torch.empty_like(x)), signs)


def test_the_reference_gives_the_same_bytes_on_a_gpu() -> None:
    x = torch.randn(10_000, device="cuda")
    residual = torch.zeros_like(x)
    residual_reference = residual.clone()
    payload = SignCodec().encode(x, residual)
    assert torch.equal(payload, SignCodec(kernels="reference").encode(x, residual_reference))
    assert torch.equal(residual, residual_reference)


def test_subnormal_numbers_are_numbers() -> None:
    codec, x = SignCodec(), torch.randn(5000) * 1e-39
    residual, x_gpu = torch.randn(5000) * 1e-39, x.cuda()
    residual_gpu = residual.cuda()
    payload, payload_gpu = codec.encode(x, residual), codec.encode(x_gpu, residual_gpu)
    assert same(payload, payload_gpu)
    assert same(residual, residual_gpu)
    assert codec.decode(payload_gpu, numel=5000).abs().min() > 0
