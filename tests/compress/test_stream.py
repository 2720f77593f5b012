"""What is copied past the cache arrives whole, widened exactly, and nothing beside it is touched."""

from __future__ import annotations

import pytest
import torch

from onebit.compress.cpu.stream import stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1000, 200_001])
def test_it_is_a_copy(numel: int, dtype: torch.dtype) -> None:
    x = torch.randn(numel + 1, generator=torch.Generator().manual_seed(numel)).to(dtype)[1:]  # unaligned
    x[: numel // 3] *= 1e-6  # subnormal in fp16
    held = torch.full((numel + 64,), -7.0)
    out = held[-held.data_ptr() % 64 // 4 :][:numel]
    stream(out, x)
    assert torch.equal(out, x.float())
    assert int((held == -7.0).sum()) == 64 + int((out == -7.0).sum())
