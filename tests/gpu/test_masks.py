"""Masks on CUDA: the fast kernels take every block that a mask leaves whole, and all bytes are those of the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, run_threads
from onebit.compress import Layout, SignCodec
from onebit.compress.gpu import operators
from onebit.compress.masks import pack_mask
from onebit.optim.gpu import momentum as kernels
from tests.gpu import test_fused_momentum as momentum_tests
from tests.gpu.test_fused_momentum import ALPHA, BETA1, Case, case_of, differing, given, live_of, updated, values

DEVICE = "cuda"
SIZES = [5000, 1, 33, 3 * 1024, 7 * 1024]
CHUNKS = 3
CODEC = SignCodec(kernels="reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Which elements of a tensor take no part, from their numbers and that of the tensor.
MASKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "one entry": lambda i, tensor: (i == 1500) & (tensor == 0),
    "a row of one block and the end of the next": lambda i, tensor: (i >= 1024) & (i < 2060) & (tensor == 4),
    "a tensor": lambda i, tensor: (i >= 0) & (tensor == 3),
    "many entries of most blocks": lambda i, tensor: (i // 1024 % 3 != 1) & (i % 5 < 2),
    "an entry of every block": lambda i, tensor: i % 1024 == 31,
    "all": lambda i, tensor: i >= 0,
}


def masks_of(name: str) -> list[Tensor]:
    """One bool tensor per tensor, on the CPU."""
    return [MASKS[name](torch.arange(size), index) for index, size in enumerate(SIZES)]


def packed(name: str, layout: Layout) -> tuple[Tensor, Tensor]:
    """A mask on the CPU and on the device."""
    masks = masks_of(name)
    on_cpu, on_device = pack_mask(masks, layout), pack_mask([mask.to(DEVICE) for mask in masks], layout)
    assert on_cpu is not None
    assert on_device is not None
    assert differing(on_cpu, on_device) == 0
    return on_cpu, on_device


def blocks_of(name: str, layout: Layout, chunk: int | None = None) -> list[int]:
    """Blocks of 1024 real elements that all take part, others of 1024 real elements, and all the rest."""
    masks, clean, whole = masks_of(name), 0, 0
    for s in layout.segments if chunk is None else layout.chunk_segments(chunk):
        blocks = [b for b in masks[s.tensor][s.offset : s.offset + s.numel].split(1024) if len(b) == 1024]
        clean, whole = clean + sum(not bool(b.any()) for b in blocks), whole + len(blocks)
    return [clean, whole - clean, (layout.blocks if chunk is None else layout.chunk_blocks) - whole]


def counted(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Blocks that each kernel of a module is launched for, as far as it takes one warp for each."""
    blocks: Counter[str] = Counter()
    launch: Callable[..., None] = module.launch  # type: ignore[attr-defined]

    def counting(file: str | Path, kernel: str, device: torch.device, threads: int, *arguments: int) -> None:
        blocks[kernel] += threads // 32
        launch(file, kernel, device, threads, *arguments)

    monkeypatch.setattr(module, "launch", counting)
    return blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_the_codec_gives_the_bytes_of_the_reference(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    blocks = counted(operators, monkeypatch)
    (layout,) = CODEC.plan(SIZES, CHUNKS)
    mask, mask_there = packed(name, layout)
    x, residual = values(SIZES, [dtype]), torch.randn(layout.padded_numel)
    x_there, residual_there = given(x), residual.to(DEVICE, copy=True)
    payload = CODEC.encode(x, residual, layout=layout, mask=mask)
    sent = torch.zeros_like(payload, device=DEVICE)
    operators.encode(x_there, residual_there, mask_there, sent, layout, False)
    assert (differing(sent, payload), differing(residual_there, residual)) == (0, 0), "encode"

    operators.decode(sent.view(CHUNKS, -1), mask_there, x_there, layout, False)
    CODEC.decode(payload, x, layout=layout, mask=mask)
    assert [differing(a, b) for a, b in zip(x_there, x, strict=True)] == [0] * len(x), "decode"
    encoded = [blocks[f"encode_{kind}{momentum_type(dtype)}"] for kind in ("full_", "masked_", "")]
    assert encoded == blocks_of(name, layout), blocks

    for chunk in range(CHUNKS):
        rows = torch.stack([payload.view(CHUNKS, -1)[chunk], payload.view(CHUNKS, -1)[(chunk + 1) % CHUNKS]])
        server = torch.randn(layout.chunk_numel)
        server_there = server.to(DEVICE, copy=True)
        mean = CODEC.reduce_encode(rows, server, layout=layout, chunk=chunk, mask=mask)
        mean_there = torch.zeros_like(mean, device=DEVICE)
        blocks.clear()
        operators.reduce_encode(rows.to(DEVICE), server_there, mask_there, mean_there, layout, chunk, False)
        wrong = differing(mean_there, mean), differing(server_there, server)
        assert wrong == (0, 0), f"{wrong} bytes and residuals differ in chunk {chunk}"
        reduced = [blocks[f"reduce_encode{kind}"] for kind in ("_full_2", "_masked", "")]
        assert reduced == blocks_of(name, layout, chunk), (chunk, blocks)


def momentum_type(dtype: torch.dtype) -> str:
    """A dtype as kernels' names have it."""
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


def test_another_mask_is_never_taken_for_the_one_before() -> None:
    """Masks come and go, so a later one may lie where an earlier one lay; and one may be written to."""
    torch.manual_seed(1)
    (layout,) = CODEC.plan(SIZES, CHUNKS)
    x, residual = values(SIZES, [torch.float32]), torch.randn(layout.padded_numel)
    x_there = given(x)

    def check(mask: Tensor | None, mask_there: Tensor | None, told: str) -> None:
        mine, theirs = residual.clone(), residual.to(DEVICE, copy=True)
        expected = CODEC.encode(x, mine, layout=layout, mask=mask)
        sent = torch.zeros_like(expected, device=DEVICE)
        operators.encode(x_there, theirs, mask_there, sent, layout, False)
        assert (differing(sent, expected), differing(theirs, mine)) == (0, 0), told

    addresses = set()
    for name in ("one entry", "a tensor", "all", "an entry of every block", "one entry"):
        mask, mask_there = packed(name, layout)
        check(mask, mask_there, f"{name}, lying at {mask_there.data_ptr()}, before it {addresses}")
        check(None, None, f"none after {name}")
        addresses.add(mask_there.data_ptr())
        del mask_there
    mask, mask_there = packed("one entry", layout)
    check(mask, mask_there, "before it is written to")
    mask, other = packed("a tensor", layout)
    mask_there.copy_(other)
    check(mask, mask_there, "after it was written to")


def masked_case(name: str) -> Case:
    """As `case_of`, with a mask that leaves blocks whole."""
    case = case_of(SignCodec(), SIZES, CHUNKS, masked=False)
    mask, mask_there = packed(name, case.part.layout)
    payload = case.codec.encode(case.momenta, layout=case.part.layout, mask=mask)
    momenta = [torch.empty(n) for n in SIZES]
    case.codec.decode(payload, momenta, layout=case.part.layout, mask=mask)
    part = replace(case.part, mask=mask_there, gathered=payload.to(DEVICE, copy=True))
    return Case(part, case.codec, mask, case.residual, payload, momenta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_fused_step_is_that_of_separate_operations(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    blocks = counted(kernels, monkeypatch)
    case, kind = masked_case(name), momentum_type(dtype)
    layout, expected_blocks = case.part.layout, blocks_of(name, case.part.layout)
    grads, params = values(SIZES, [dtype]), values(SIZES, [dtype])
    variances = [torch.rand(n).masked_fill(mask, 0.0) for n, mask in zip(SIZES, masks_of(name), strict=True)]
    scalars = torch.tensor([[1e-3 * (i + 1), 1.5 + i, 1 - 1e-5 * i] for i in range(len(SIZES))])

    local = momentum_tests.local_momenta(case, grads, params, 0.0)
    before = case.residual.clone()
    expected = case.codec.encode(local, case.residual, layout=layout, mask=case.mask)
    arguments = (case.part, given(grads), case.payload.to(DEVICE), [])
    kernels.encode_momentum(*arguments, beta1=BETA1, alpha=ALPHA, l2=0.0)
    wrong = differing(case.part.sent, expected), differing(case.part.residual, case.residual)
    assert wrong == (0, 0), f"{wrong} bytes and residuals differ"
    encoded = [blocks[kernel] for kernel in (f"encode_full_{kind}", f"encode_masked_{kind}", "encode_any")]
    assert encoded == expected_blocks, blocks

    moved, _ = updated(case, params, [None] * len(SIZES), variances, scalars, 1e-8)
    p, momentum = given(params), torch.zeros_like(case.part.gathered)
    kernels.decode_update(case.part, p, [None] * len(SIZES), given(variances), momentum, scalars.to(DEVICE), eps=1e-8)
    assert [differing(mine, theirs) for mine, theirs in zip(p, moved, strict=True)] == [0] * len(SIZES)
    assert differing(momentum, case.payload) == 0
    renewed = [blocks[kernel] for kernel in (f"update_full_{kind}", f"update_masked_{kind}", "update_any")]
    assert renewed == expected_blocks, blocks

    kernels.undo_encode(*arguments, beta1=BETA1, alpha=ALPHA, l2=0.0)
    live = live_of(case)
    # c, what is said of it and the residuals are below 16, and five operations round each of them.
    torch.testing.assert_close(case.part.residual.cpu()[live], before[live], rtol=0, atol=5 * 16 * 2.0**-24)


def averages(backend: Backend, device: str, names: Sequence[str | None]) -> list[list[Tensor]]:
    """What is averaged under one mask after the other, by the same object."""
    generator = torch.Generator().manual_seed(backend.rank)
    reduce = CompressedAllreduce([torch.empty(n, device=device) for n in SIZES], backend, bucket_mb=0.02)
    made: list[list[Tensor]] = []
    for name in names:
        reduce.set_mask(None if name is None else [mask.to(device) for mask in masks_of(name)])
        for _ in range(2):
            tensors = [torch.randn(n, generator=generator).to(device) for n in SIZES]
            reduce(tensors)
            made.append([t.cpu() for t in tensors])
    return made


def test_an_average_under_changing_masks_is_the_cpus() -> None:
    names: list[Any] = ["all", "one entry", "a tensor", None, "many entries of most blocks", "one entry"]
    there, here = (run_threads(2, averages, device, names) for device in (DEVICE, "cpu"))
    for rank, (mine, theirs) in enumerate(zip(there, here, strict=True)):
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            wrong = [differing(x, y) for x, y in zip(a, b, strict=True)]
            assert not any(wrong), f"{wrong} elements differ on rank {rank} under {names[number // 2]}"
