"""Inputs that a codec must survive, and the way from tensors to the oracle's arrays and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from onebit.compress import Layout, SignCodec
from onebit.compress.kernels import DEVICES, IMPLEMENTATIONS
from tests.compress import oracle

KERNELS = tuple(name for name in IMPLEMENTATIONS if DEVICES.get(name, "cpu") == "cpu")
BLOCK_SIZES = (32, 96, 1024, 2080, None)  # 96 and 2080 fill no whole number of rows of 128 lanes
NUMELS = (1, 0, 31, 32, 33, 1024, 1025, 3000, 0, 96)
LEFT_OVER = 0xA5  # what a buffer held before it was written

HUGE = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 65504.0}
DENORMAL = {torch.float32: 1e-45, torch.bfloat16: 1e-39, torch.float16: 6e-8}
SPECIALS = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-39, -6e-8, 1e-20, 3e38, -3e38, 65504.0, -1e5)
NON_FINITE = (float("inf"), float("-inf"), float("nan"))
KINDS = ("normal", "sparse", "zeros", "denormal", "huge", "poisoned", "constant", "mixed")


def values(kind: str, numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor of one of KINDS; "poisoned" is the one with non-finite elements."""
    x = torch.randn(numel, generator=generator)
    if kind == "sparse":
        x *= torch.rand(numel, generator=generator) < 0.01
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "denormal":
        x = torch.where(x > 1.5, x * DENORMAL[dtype] * 5, torch.where(x > 0, DENORMAL[dtype], -0.0))
    elif kind == "huge":
        x = x.sign() * HUGE[dtype]
    elif kind == "constant":
        x = torch.full((numel,), -0.25)
    elif kind == "mixed":
        x *= 10.0 ** torch.randint(-6, 4, (numel,), generator=generator)
    elif kind == "poisoned" and numel:
        where = torch.randint(0, numel, (2,), generator=generator)
        x[where] = torch.tensor(NON_FINITE)[torch.randint(0, 3, (2,), generator=generator)]
    return x.to(dtype)


def tensors(numels: Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """One tensor per size, each of another kind."""
    generator = torch.Generator().manual_seed(seed)
    return [values(KINDS[(i + seed) % len(KINDS)], n, dtype, generator) for i, n in enumerate(numels)]


def residual_of(layout: Layout, seed: int = 0) -> Tensor:
    """A padded residual; padding holds a value, for it must be neither read nor written."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layout.padded_numel, generator=generator) * 0.5


def mask_of(layout: Layout, seed: int = 0) -> Tensor:
    """A padded mask: a third of the bits is set, padding included, and every fourth block is masked whole."""
    bits = np.random.default_rng(seed).random((layout.blocks, layout.block_size)) < 1 / 3
    bits[::4] = True
    return torch.from_numpy(oracle.pack(bits.reshape(-1)))


def blocks(padded: Tensor, shape: oracle.Geometry) -> oracle.Floats:
    """A padded fp32 tensor as the oracle's (blocks, block_size)."""
    return padded.numpy().copy().reshape(-1, shape.block_size)


def mask_blocks(mask: Tensor | None, shape: oracle.Geometry) -> oracle.Bools | None:
    return None if mask is None else oracle.unpack(mask.numpy()).reshape(-1, shape.block_size)


def arrays(xs: Sequence[Tensor]) -> list[oracle.Floats]:
    """fp32 arrays; exact for every dtype that a codec takes."""
    return [x.detach().float().numpy().reshape(-1) for x in xs]


def unaligned(x: Tensor) -> Tensor:
    """The same values, one element after the start of an allocation."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    room[1:] = x
    return room[1:]


def as_bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and as_bytes(a) == as_bytes(b)


def assert_same_numbers(a: Tensor, b: Tensor) -> None:
    """Bit for bit, -0.0 apart from 0.0, but one NaN is as good as another."""
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    words = torch.int32 if a.dtype == torch.float32 else torch.int16
    zero = torch.zeros((), dtype=words)
    assert torch.equal(torch.where(a.isnan(), zero, a.view(words)), torch.where(b.isnan(), zero, b.view(words)))


def random_payloads(codec: SignCodec, layout: Layout, ranks: int, seed: int = 0) -> Tensor:
    """(ranks, payload_bytes): payloads of chunk 0 as encoders send them, with scales of every kind."""
    rng = np.random.default_rng(seed)
    shape = (ranks * layout.chunk_blocks, layout.block_size)
    scales = rng.choice(
        [0.0, 1e-45, 1e-39, 0.3, 1.0, 7.5, 3e38, np.nan], shape[0], p=[0.1, 0.05, 0.05, 0.3, 0.2, 0.2, 0.05, 0.05]
    )
    geometry = oracle.Geometry(layout.block_size, False, [[oracle.PADDING] * layout.chunk_blocks])
    payloads = oracle.build(rng.random(shape) < 0.5, scales.astype(np.float32), geometry, ranks)
    return torch.from_numpy(payloads)


def numels() -> st.SearchStrategy[int]:
    return st.sampled_from((0, 1, 2, 31, 32, 33, 127, 128, 1023, 1024, 1025, 2049)) | st.integers(0, 3000)


def codecs(kernels: str | None = None) -> st.SearchStrategy[SignCodec]:
    return st.builds(
        SignCodec,
        block_size=st.sampled_from((32, 64, 96, 1024, None)),
        scale=st.sampled_from(("mean", "rms")),
        kernels=st.just(kernels),
    )


@st.composite
def any_tensor(draw: st.DrawFn, numel: int, dtype: torch.dtype, finite: bool = False) -> Tensor:
    """Values of one kind, with special ones strewn in."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    names = [kind for kind in KINDS if not (finite and kind == "poisoned")]
    x = values(draw(st.sampled_from(names)), numel, dtype, generator)
    pool = [*SPECIALS, *(() if finite else NON_FINITE)]
    for _ in range(draw(st.integers(0, 3)) if numel else 0):
        special = torch.tensor(draw(st.sampled_from(pool))).to(dtype)
        if not finite or special.isfinite():
            x[draw(st.integers(0, numel - 1))] = special
    return x
