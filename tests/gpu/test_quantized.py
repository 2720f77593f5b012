"""The quantizing codecs' CUDA kernels give the bytes of their reference, and start as all kernels here do."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, run_threads
from onebit.compress import Fp8Codec, Int4Codec, Int8Codec, Layout, quantized_reference
from onebit.compress.gpu import quantized
from onebit.compress.masks import pack_mask
from onebit.compress.quantized import QuantizedCodec
from tests.comm.launcher import run_ranks

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [[1], [7], [1000, 3], [5000, 1, 33, 0, 2048], [4096 * 3 + 5]]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
NUMEL = 1 << 20
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def codecs(block_size: int = 1024) -> dict[str, QuantizedCodec]:
    """Every format, rounding and rotation that blocks of this size allow."""
    made: dict[str, QuantizedCodec] = {"fp8": Fp8Codec(block_size=block_size)}
    power = block_size & (block_size - 1) == 0 and block_size <= 4096
    for name, codec in (("int8", Int8Codec), ("int4", Int4Codec)):
        for rotate in (False, True)[: 1 + power]:
            for rounding, seed in (("nearest", 0), ("stochastic", 2**32 - 5)):
                options: dict[str, Any] = {"rounding": rounding, "rotate": rotate, "seed": seed}
                told = f"{name}{', rotated' if rotate else ''}, {rounding}"
                made[told] = codec(block_size=block_size, **options)
    return made


def differing(a: Tensor, b: Tensor) -> str:
    """Which elements have other bits, for the message; empty: none."""
    a, b = a.cpu(), b.cpu()
    words = WORDS[a.element_size()]
    wrong = (a.view(words) != b.view(words)).flatten().nonzero().flatten()
    if not len(wrong):
        return ""
    pairs = [(int(i), a.flatten()[i].item(), b.flatten()[i].item()) for i in wrong[:5]]
    return f"{len(wrong)} of {a.numel()} differ, the first (where, there, expected): {pairs}"


def samples(sizes: list[int], dtype: torch.dtype, special: bool) -> list[Tensor]:
    """Numbers of many magnitudes; special: with zeros of both signs, blocks that say nothing, and some not finite."""
    made = []
    for size in sizes:
        x = torch.randn(size) * torch.exp2(torch.randint(-8, 8, (size,)).float())
        if special and size > 3:
            x[::3] = 0
            x[1] = -0.0
            x[2] = 1e-40
            if size > 2000:
                x[1024:1100] = 1e30
                x[1500] = float("nan")
            if size > 4999:
                x[2048:3072] *= 1e-36
                x[4000] = float("-inf")
        made.append(x.to(dtype))
    return made


def placed(x: Tensor, unaligned: bool) -> Tensor:
    """The same on the device; unaligned: starting one element after an aligned address."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[unaligned : x.numel() + unaligned].copy_(x)


def check(
    codec: QuantizedCodec,
    sizes: list[int],
    dtype: torch.dtype,
    *,
    chunks: int = 1,
    masked: bool = False,
    special: bool = False,
    unaligned: bool = False,
    feedback: bool = True,
) -> None:
    """All four operators give the bytes, residuals and values of the reference on the CPU."""
    (layout,), how = codec.plan(sizes, chunks), codec.quantizer
    case = f"{codec}: {sizes} of {dtype} in {chunks} chunks, {masked=}, {special=}, {unaligned=}, {feedback=}: "
    mask = torch.randint(0, 256, (layout.padded_numel // 8,), dtype=torch.uint8) if masked else None
    mask_there = None if mask is None else mask.to(DEVICE)
    x, payload = samples(sizes, dtype, special), empty(layout, chunks)
    x_there, sent = [placed(part, unaligned) for part in x], payload.to(DEVICE, copy=True)
    residual = torch.randn(layout.padded_numel) if feedback else None
    residual_there = None if residual is None else placed(residual, unaligned)
    quantized_reference.encode(x, residual, mask, payload, layout, how)
    quantized.encode(x_there, residual_there, mask_there, sent, layout, how)
    assert not differing(sent, payload), case + "payload: " + differing(sent, payload)
    if residual is not None and residual_there is not None:
        assert not differing(residual_there, residual), case + "residual: " + differing(residual_there, residual)

    quantized_reference.decode(payload.view(chunks, -1), mask, x, layout, how)
    quantized.decode(sent.view(chunks, -1), mask_there, x_there, layout, how)
    for mine, theirs in zip(x_there, x, strict=True):
        assert not differing(mine, theirs), case + "decoded: " + differing(mine, theirs)

    for chunk in range(chunks):
        rows = torch.stack([payload.view(chunks, -1)[(chunk + k) % chunks] for k in range(3)])
        check_reduce(codec, layout, chunk, rows, mask, case, feedback, unaligned)


def check_reduce(
    codec: QuantizedCodec,
    layout: Layout,
    chunk: int,
    rows: Tensor,
    mask: Tensor | None,
    case: str,
    feedback: bool,
    unaligned: bool,
) -> None:
    how, mask_there = codec.quantizer, None if mask is None else mask.to(DEVICE)
    residual = torch.randn(layout.chunk_numel) if feedback else None
    residual_there = None if residual is None else placed(residual, unaligned)
    mean, rows_there = empty(layout, 1), rows.to(DEVICE)
    mean_there = mean.to(DEVICE, copy=True)
    quantized_reference.reduce_encode(rows, residual, mask, mean, layout, chunk, how)
    quantized.reduce_encode(rows_there, residual_there, mask_there, mean_there, layout, chunk, how)
    assert not differing(mean_there, mean), case + f"mean of chunk {chunk}: " + differing(mean_there, mean)
    if residual is None or residual_there is None:
        return
    assert not differing(residual_there, residual), case + "server residual: " + differing(residual_there, residual)
    for keep in (torch.tensor(True), None, torch.tensor(False)):
        keep_there = None if keep is None else keep.to(DEVICE)
        quantized_reference.undo_reduce(rows, residual, mask, mean, layout, chunk, keep, how)
        quantized.undo_reduce(rows_there, residual_there, mask_there, mean_there, layout, chunk, keep_there, how)
        assert not differing(residual_there, residual), (
            case + f"undone, {keep=}: " + differing(residual_there, residual)
        )


def empty(layout: Layout, payloads: int) -> Tensor:
    """Room for payloads, on the CPU."""
    return torch.zeros(payloads * layout.payload_bytes, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1024, 32, 96, 256, 2048, 4096, 5120])
def test_bytes_residuals_and_values_are_those_of_the_reference(block_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for codec in codecs(block_size).values():
        for sizes, masked, special, unaligned in itertools.product(SIZES, *[(False, True)] * 3):
            check(codec, sizes, dtype, chunks=1 + 2 * masked, masked=masked, special=special, unaligned=unaligned)
        check(codec, SIZES[3], dtype, chunks=2, special=True, feedback=False)


@pytest.mark.parametrize("ranks", [1, 2, 4, 5, 8, 16])
def test_the_mean_of_any_number_of_payloads_is_that_of_the_reference(ranks: int) -> None:
    torch.manual_seed(ranks)
    for codec in codecs().values():
        (layout,) = codec.plan([5000])
        rows = torch.stack([empty(layout, 1) for _ in range(ranks)])
        for row in rows:
            quantized_reference.encode([torch.randn(5000)], None, None, row, layout, codec.quantizer)
        check_reduce(codec, layout, 0, rows, None, f"{codec} of {ranks}: ", True, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", [Int8Codec(rotate=True), Int4Codec(rotate=True)], ids=str)
def test_rotated_blocks_of_any_codes_and_scales_decode_as_the_reference_has_them(
    codec: QuantizedCodec, dtype: torch.dtype
) -> None:
    """Largest codes that are a row of the transform have the largest sums; other bytes than are ever sent, too."""
    torch.manual_seed(1)
    blocks, size = 40, 1024 * codec.quantizer.bits // 8
    (layout,) = codec.plan([1024 * blocks])
    payload = torch.randint(0, 256, (layout.payload_bytes,), dtype=torch.uint8)
    for block, code in enumerate((0x00, 0x7F, 0x77, 0x80, 0x88, 0x81, 0x99)):
        payload[block * size : (block + 1) * size] = code
    scales = torch.exp2(torch.randint(-149, 100, (blocks,)).float())
    scales[7::8], scales[30], scales[31] = 1.0, float("nan"), 0.0
    payload[layout.bits_bytes :].view(torch.float32)[:blocks] = scales
    x = torch.empty(1024 * blocks, dtype=dtype)
    there = placed(x, False)
    quantized_reference.decode(payload, None, [x], layout, codec.quantizer)
    quantized.decode(payload.to(DEVICE), None, [there], layout, codec.quantizer)
    assert not differing(there, x), differing(there, x)


def check_every_number(codec: QuantizedCodec, numbers: Tensor) -> None:
    """Blocks that hold `numbers` beside one that is the largest, so that the steps are 1 and 1."""
    most = codec.quantizer.largest
    rows = numbers.split(1023)
    x = torch.cat([torch.cat([torch.tensor([most]), row]) for row in rows])
    check_encoded(codec, x)


def check_encoded(codec: QuantizedCodec, x: Tensor) -> None:
    """The bytes of one tensor without error feedback."""
    (layout,) = codec.plan([x.numel()])
    payload = empty(layout, 1)
    there = payload.to(DEVICE, copy=True)
    quantized_reference.encode([x], None, None, payload, layout, codec.quantizer)
    quantized.encode([x.to(DEVICE)], None, None, there, layout, codec.quantizer)
    assert not differing(there, payload), f"{codec}: " + differing(there, payload)


def around(numbers: Tensor) -> Tensor:
    """Each number of both signs and its neighbours in fp32."""
    near = [numbers, torch.nextafter(numbers, torch.tensor(0.0)), torch.nextafter(numbers, torch.tensor(1e9))]
    return torch.cat([*near, *(-x for x in near)])


def test_ties_and_their_neighbours_are_rounded_as_the_reference_does() -> None:
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # of one sign, the last is 448
    check_every_number(Fp8Codec(), around(torch.cat([every, (every[1:] + every[:-1]) / 2])))
    for codec, most in ((Int8Codec(), 127), (Int4Codec(), 7)):
        check_every_number(codec, around(torch.arange(2 * most) / 2))
    for codec in (Int8Codec(rounding="stochastic", seed=3), Int4Codec(rounding="stochastic", seed=3)):
        check_every_number(codec, around(torch.arange(14) / 2))


def blocks_at_bounds() -> Tensor:
    """Blocks whose largest magnitudes are the bounds of what has a scale, their neighbours, or no number at all."""
    bounds = torch.tensor([2.0**-100, 2.0**115, 2.0**127])
    near = [bounds, torch.nextafter(bounds, torch.tensor(0.0)), torch.nextafter(bounds, torch.tensor(torch.inf))]
    largest = torch.cat([*near, torch.tensor([0.0, 1e-40, 1.0, torch.inf, torch.nan])])
    blocks = (2 * torch.rand(len(largest), 1024) - 1) * largest.nan_to_num(1.0, 1.0)[:, None]
    blocks[0::2, 7], blocks[1::2, 7] = largest[0::2], -largest[1::2]
    blocks[:, 8], blocks[:, 9], blocks[:, 10] = -0.0, 1e-40, -largest.nan_to_num(1.0, 1.0)
    return blocks.flatten()


def test_blocks_at_the_bounds_of_what_has_a_scale() -> None:
    torch.manual_seed(5)
    for name, codec in codecs().items():
        x, how = blocks_at_bounds(), codec.quantizer
        (layout,) = codec.plan([x.numel()])
        payload = empty(layout, 1)
        there = payload.to(DEVICE, copy=True)
        for residual in (None, torch.where(x.isfinite(), x * 2.0**-9, 0.0)):
            residual_there = None if residual is None else residual.to(DEVICE, copy=True)
            quantized_reference.encode([x], residual, None, payload, layout, how)
            quantized.encode([x.to(DEVICE)], residual_there, None, there, layout, how)
            assert not differing(there, payload), f"{name}: payload: " + differing(there, payload)
            if residual is not None and residual_there is not None:
                told = differing(residual_there, residual)
                assert not told, f"{name}: residual: {told}"
            for dtype in DTYPES:
                expected, mine = x.to(dtype), x.to(DEVICE, dtype, copy=True)
                quantized_reference.decode(payload.view(1, -1), None, [expected], layout, how)
                quantized.decode(there.view(1, -1), None, [mine], layout, how)
                assert not differing(mine, expected), f"{name}: {dtype}: " + differing(mine, expected)
            check_reduce(codec, layout, 0, payload.repeat(3, 1), None, f"{name}: ", residual is not None, False)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Warps that each kernel is launched with."""
    warps: Counter[str] = Counter()
    launch: Callable[..., None] = quantized.launch

    def counting(file: str | Path, kernel: str, device: torch.device, threads: int, *arguments: int) -> None:
        warps[kernel] += threads // 32
        launch(file, kernel, device, threads, *arguments)

    monkeypatch.setattr(quantized, "launch", counting)
    return warps


@pytest.mark.parametrize("feedback", [True, False])
def test_whole_blocks_go_to_the_fast_kernels(feedback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    warps, codec = counted(monkeypatch), Int8Codec()
    (layout,), how = codec.plan([3 * 1024, 1500]), codec.quantizer
    mask = pack_mask([torch.zeros(3 * 1024, device=DEVICE) > 0, torch.arange(1500, device=DEVICE) == 3], layout)
    x = [torch.randn(n).to(DEVICE) for n in (3 * 1024, 1500)]
    residual = torch.zeros(layout.padded_numel, device=DEVICE) if feedback else None
    there = empty(layout, 1).to(DEVICE)
    quantized.encode(x, residual, None, there, layout, how)
    quantized.reduce_encode(there.view(1, -1), residual, None, there.clone(), layout, 0, how)
    quantized.decode(there, None, x, layout, how)
    assert warps == {
        **{"encode_full_f32": 4, "encode_f32": 1, "reduce_encode_full": 4, "reduce_encode": 1},
        **{"decode_full_f32": 2, "decode_f32": 1},
    }
    warps.clear()
    quantized.encode(x, residual, mask, there, layout, how)
    assert warps == {"encode_full_f32": 3, "encode_f32": 2}


def average_with_itself(codec: QuantizedCodec, x: Tensor, residuals: Tensor) -> Callable[[], None]:
    """encode, reduce_encode and decode of `x` into `x`, with buffers made once; residuals: (2, numel)."""
    (layout,) = codec.plan([x.numel()])
    sent, mean = torch.zeros(2, layout.payload_bytes, dtype=torch.uint8, device=x.device)
    operators = codec.unchecked(x.device)

    def run() -> None:
        operators.encode([x], residuals[0], None, sent, layout)
        operators.reduce_encode(sent.view(1, -1), residuals[1], None, mean, layout, 0)
        operators.decode(mean.view(1, -1), None, [x], layout)

    return run


@pytest.mark.parametrize("name", codecs())
def test_nothing_waits_is_allocated_or_escapes_a_graph(name: str) -> None:
    codec = codecs()[name]
    assert codec.kernels_on("cuda") == "gpu"
    start = torch.randn(NUMEL + 5, device="cuda")
    x, residuals = start.clone(), torch.zeros(2, NUMEL + 8, device="cuda")
    run = average_with_itself(codec, x, residuals)
    run()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    eager, kept = x.clone(), residuals.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    x.copy_(start)
    residuals.zero_()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert not differing(x, eager), differing(x, eager)
    assert not differing(residuals, kept), differing(residuals, kept)


@two_gpus
def test_every_device_of_a_process_is_right_whatever_the_current_one() -> None:
    x = torch.randn(NUMEL)
    for codec in codecs().values():
        payload = codec.encode(x)
        for device, current in itertools.product(range(torch.cuda.device_count()), repeat=2):
            with torch.cuda.device(current):
                there = codec.encode(x.to(f"cuda:{device}"))
                assert not differing(there, payload), (
                    f"cuda:{device} with {current} current: {differing(there, payload)}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8, nearest", "int4, rotated, nearest", "fp8"])
def test_more_than_2_to_the_31_elements(name: str) -> None:
    numel, codec = 2**31 + 5000, codecs()[name]
    if torch.cuda.mem_get_info()[0] < 12 * numel:
        pytest.skip("needs 26 GB of free memory")
    block = torch.randn(1024).to(torch.bfloat16)
    x = block.repeat(-(-numel // 1024))[:numel].to("cuda")
    x[-5000:] = -2.0
    residual = torch.zeros(numel, device="cuda")
    payload = codec.encode(x, residual)
    out = torch.empty_like(x)
    codec.decode(payload, out)
    expected = torch.empty(1024, dtype=torch.bfloat16)
    codec.decode(codec.encode(block), expected)
    whole = 2**31 // 1024
    wrong = (out[: 2**31].view(whole, 1024).view(torch.int16) != expected.view(torch.int16).to("cuda")).any(1)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} blocks of {whole} differ, the first is {int(wrong.argmax())}"
    rest = residual[: 2**31].view(whole, 1024)
    assert not (rest != rest[0]).any(), f"{name}: residuals of the same blocks differ"
    assert not differing(out[-3000:], torch.full((3000,), -2.0, dtype=torch.bfloat16)) or "rotated" in name


def averages(backend: Backend, device: str, name: str, feedback: bool) -> list[Tensor]:
    """Three averages in a row of the same object, of tensors of each dtype."""
    codec = codecs()[name]
    codec = type(codec)(**{**codec.__dict__, "error_feedback": feedback})
    generator, sizes = torch.Generator().manual_seed(backend.rank), [5000, 1, 33, 3 * 1024, 100_000]
    reduce = CompressedAllreduce([torch.empty(n, device=device) for n in sizes], backend, codec=codec, bucket_mb=0.2)
    made = []
    for _ in range(3):
        tensors = [torch.randn(n, generator=generator).to(device) for n in sizes]
        reduce(tensors)
        made += [t.cpu() for t in tensors]
    return made


def averages_of_all(backend: Backend, device: str) -> dict[tuple[str, bool], list[Tensor]]:
    """`averages` of every codec, with error feedback and without."""
    return {
        (name, feedback): averages(backend, device, name, feedback) for name in codecs() for feedback in (True, False)
    }


@two_gpus
def test_averages_over_nccl_are_those_of_threads_on_the_cpu() -> None:
    expected = run_threads(2, averages_of_all, "cpu")
    for rank, (mine, theirs) in enumerate(zip(run_ranks("nccl", 2, averages_of_all, "cuda"), expected, strict=True)):
        for which, tensors in mine.items():
            for number, (a, b) in enumerate(zip(tensors, theirs[which], strict=True)):
                assert not differing(a, b), f"rank {rank}, {which}, tensor {number}: {differing(a, b)}"
