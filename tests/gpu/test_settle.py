"""What ends a step whose fate only the device knows: looking at scales, and putting error feedback back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from onebit.compress import SignCodec
from onebit.compress.layout import Layout

NUMELS = (5000, 0, 1, 1024, 77, 40_000)
RANKS = 3


def bits(t: Tensor) -> Tensor:
    return t.cpu().view(torch.int32)


def payloads_of(codec: SignCodec, chunk: int, mask: Tensor | None, spoiled: bool) -> Tensor:
    """(RANKS, payload_bytes) on the CPU: one chunk's payloads; spoiled: some blocks are not finite."""
    (layout,) = codec.plan(NUMELS, 2)
    rows = []
    for rank in range(RANKS):
        x = [torch.randn(n, generator=torch.Generator().manual_seed(rank)) * 10.0**rank for n in NUMELS]
        if spoiled and rank == 1:
            x[0][3000], x[5][39_999] = torch.inf, torch.nan
        rows.append(codec.encode(x, layout=layout, mask=mask).view(layout.chunks, -1)[chunk])
    return torch.stack(rows)


@pytest.mark.parametrize("keep", [None, False, True], ids=["unasked", "not kept", "kept"])
@pytest.mark.parametrize("scale", ["mean", "rms"])
@pytest.mark.parametrize("block_size", [1024, 32, 96, 2048, None])
def test_what_undo_reduce_puts_back_is_what_the_reference_does(
    block_size: int | None, scale: str, keep: bool | None
) -> None:
    codec = SignCodec(block_size=block_size, scale=scale)  # type: ignore[arg-type]
    (layout,) = codec.plan(NUMELS, 2)
    for chunk, masked, spoiled in itertools.product((0, 1), (False, True), (False, True)):
        mask = torch.randint(0, 256, (layout.padded_numel // 8,), dtype=torch.uint8) if masked else None
        mask_gpu = None if mask is None else mask.cuda()
        payloads = payloads_of(codec, chunk, mask, spoiled)
        residual = torch.zeros(layout.chunk_numel)
        mine = codec.reduce_encode(payloads, residual, layout=layout, chunk=chunk, mask=mask)
        expected, seen = residual.clone(), residual.cuda()
        cpu, gpu = (codec.unchecked(torch.device(device)) for device in ("cpu", "cuda"))
        assert gpu.kernels.name == "gpu"
        kept, kept_gpu = (None if keep is None else torch.tensor(keep, device=device) for device in ("cpu", "cuda"))
        cpu.undo_reduce(payloads, expected, mask, mine, layout, chunk, kept)
        gpu.undo_reduce(payloads.cuda(), seen, mask_gpu, mine.cuda(), layout, chunk, kept_gpu)
        case = f"chunk {chunk}, masked {masked}, spoiled {spoiled}"
        wrong = int((bits(seen) != bits(expected)).sum())
        assert wrong == 0, f"{case}: {wrong} of {seen.numel()} differ"
        if keep:
            assert torch.equal(bits(seen), bits(residual)), case


def test_settling_waits_for_nothing_and_allocates_nothing() -> None:
    operators = SignCodec().unchecked(torch.device("cuda"))
    (layout,) = SignCodec().plan([1 << 20])
    payloads = SignCodec().encode(torch.randn(1 << 20, device="cuda")).view(1, -1)
    residual, mine = torch.zeros(layout.chunk_numel, device="cuda"), payloads[0].clone()
    finite = torch.tensor(False, device="cuda")
    operators.undo_reduce(payloads, residual, None, mine, layout, 0, finite)
    operators.all_finite([payloads], [layout])
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        operators.undo_reduce(payloads, residual, None, mine, layout, 0, finite)
        settled = torch.cuda.memory_stats()["allocation.all.allocated"]
        operators.undo_reduce(payloads, residual, None, mine, layout, 0, operators.all_finite([payloads], [layout]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert settled == before


def buffers(numels: list[int], chunks: int) -> tuple[list[Tensor], list[Layout]]:
    layouts = [SignCodec().plan([n], chunks)[0] for n in numels]
    return [torch.zeros(chunks * layout.payload_bytes, dtype=torch.uint8, device="cuda") for layout in layouts], layouts


@pytest.mark.parametrize("numels", [[1], [0, 5], [3000, 7, 9_000_000], [1 << 26]], ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_one_scale_that_is_not_finite_is_found_wherever_it_lies(numels: list[int], chunks: int) -> None:
    operators = SignCodec().unchecked(torch.device("cuda"))
    payloads, layouts = buffers(numels, chunks)
    for round_ in range(3):  # what one launch leaves behind must not be seen by the next
        assert operators.all_finite(payloads, layouts).item() is True, round_
        for k, layout in enumerate(layouts):
            if not layout.blocks:
                continue
            for chunk, index in {
                (0, 0),
                (chunks - 1, layout.chunk_blocks - 1),
                (chunks // 2, layout.chunk_blocks // 2),
            }:
                rows = payloads[k].view(chunks, -1)
                at = layout.bits_bytes + 4 * index
                scale = rows[chunk, at : at + 4].view(torch.float32)
                for value in (torch.nan, torch.inf):
                    scale.fill_(value)
                    assert operators.all_finite(payloads, layouts).item() is False, (round_, k, chunk, index)
                scale.fill_(1.0)
        for payload, layout in zip(payloads, layouts, strict=True):  # bits and spare bytes may be anything
            payload.view(chunks, -1)[:, : layout.bits_bytes] = 255


def test_looking_at_scales_can_be_captured_and_replayed() -> None:
    operators = SignCodec().unchecked(torch.device("cuda"))
    payloads, layouts = buffers([100_000, 2000], 2)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        operators.all_finite(payloads, layouts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = operators.all_finite(payloads, layouts)
    layout = layouts[1]
    scale = payloads[1].view(2, -1)[1, layout.bits_bytes : layout.bits_bytes + 4].view(torch.float32)
    for value, expected in ((1.0, True), (torch.nan, False), (0.0, True)):
        scale.fill_(value)
        graph.replay()
        assert found.item() is expected, value


def test_the_same_addresses_with_another_dtype_are_another_table() -> None:
    x = torch.randn(5000, device="cuda")
    (layout,) = SignCodec().plan([5000])
    SignCodec().encode(x, layout=layout)
    half = x.view(torch.bfloat16)[:5000]
    half.copy_(torch.randn(5000))
    assert half.data_ptr() == x.data_ptr()
    assert torch.equal(SignCodec().encode(half, layout=layout).cpu(), SignCodec().encode(half.cpu()))
