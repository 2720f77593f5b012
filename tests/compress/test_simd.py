"""Vector operations that the codec's own tests do not reach: each lane is rounded once, to nearest, ties to even."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.compress.cpu import simd
from onebit.compress.cpu.build import compile_kernel


def quotients(a: int, b: int, out: int, words: int) -> None:
    for at in range(0, 128 * words, 128):
        simd.store_f32(out + at, simd.divide(simd.load_f32(a + at), simd.load_f32(b + at)))


def roots(a: int, out: int, words: int) -> None:
    for at in range(0, 128 * words, 128):
        simd.store_f32(out + at, simd.square_root(simd.load_f32(a + at)))


def bf16_lanes(a: int, out: int, words: int) -> None:
    for word in range(words):
        simd.store_u16(out + 64 * word, simd.to_bf16_lanes(simd.load_f32(a + 128 * word)))


def f16_lanes(a: int, out: int, words: int) -> None:
    for word in range(words):
        simd.store_u16(out + 64 * word, simd.to_f16_lanes(simd.load_f32(a + 128 * word)))


compiled = functools.cache(compile_kernel)


def awkward_floats() -> Tensor:
    """Every upper half of an fp32 word, with lower halves that are exact, tied and next to a tie in bf16 and fp16."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return torch.from_numpy((high[:, None] | low).reshape(-1).view(np.float32))


def test_quotients_and_roots_are_rounded_once() -> None:
    """fp64 has more than twice the digits of fp32, so rounding its result once more is right."""
    a = awkward_floats().numpy()
    b = np.random.default_rng(0).permutation(a)
    out = np.empty_like(a)
    with np.errstate(all="ignore"):
        compiled(quotients)(a.ctypes.data, b.ctypes.data, out.ctypes.data, a.size // 32)
        np.testing.assert_array_equal(out, a / b)
        compiled(roots)(a.ctypes.data, out.ctypes.data, a.size // 32)
        np.testing.assert_array_equal(out, np.sqrt(a.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize(("kernel", "dtype"), [(bf16_lanes, torch.bfloat16), (f16_lanes, torch.float16)])
def test_a_vector_is_rounded_as_torch_rounds(kernel: Callable[..., None], dtype: torch.dtype) -> None:
    a = awkward_floats()
    out = torch.empty(a.numel(), dtype=dtype)
    compiled(kernel)(a.data_ptr(), out.data_ptr(), a.numel() // 32)
    expected = a.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(out.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
