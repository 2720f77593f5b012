"""What tests/gpu asks of the quantizing codecs' CUDA kernels, of the same sources run on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onebit.compress import Int4Codec, Int8Codec
from onebit.compress.gpu import quantized
from onebit.compress.kernels import DEVICES
from tests.compress import test_quantized as specification
from tests.gpu import test_quantized as on_gpu
from tests.optim import warps_on_cpu

pytestmark = [
    pytest.mark.skipif(warps_on_cpu.COMPILER is None, reason="no g++"),
    pytest.mark.usefixtures("on_cpu"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU module launches runs on the CPU, and so do the tests' own tensors."""
    monkeypatch.setattr(quantized, "launch", warps_on_cpu.launch)
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    monkeypatch.setitem(DEVICES, "gpu", "cpu")


# The fixture is the same for all examples.
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_specification(data: st.DataObject) -> None:
    test = specification.test_payloads_residuals_and_what_is_decoded_are_the_specification_bit_for_bit
    test.hypothesis.inner_test("gpu", data)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", on_gpu.codecs())
def test_whole_and_partial_blocks_of_1024(name: str) -> None:
    torch.manual_seed(0)
    codec = on_gpu.codecs()[name]
    for dtype in DTYPES:
        on_gpu.check(codec, [2100, 1, 0, 1024], dtype, chunks=2)
    on_gpu.check(codec, [5000], torch.float32, special=True)
    on_gpu.check(codec, [5000], torch.bfloat16, special=True, feedback=False)
    on_gpu.check(codec, [2100, 33], torch.float16, masked=True)
    on_gpu.check(codec, [1030], torch.float32, unaligned=True)


@pytest.mark.parametrize("block_size", [32, 96, 256, 2048, 4096, 5120])
def test_blocks_of_other_sizes(block_size: int) -> None:
    torch.manual_seed(1)
    for codec in on_gpu.codecs(block_size).values():
        size = 3 * block_size + 7 if block_size < 1024 else block_size + 1037
        on_gpu.check(codec, [size], torch.float32, masked=True)
        on_gpu.check(codec, [block_size], torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotated_blocks_of_any_codes_and_scales(dtype: torch.dtype) -> None:
    for codec in (Int8Codec(rotate=True), Int4Codec(rotate=True)):
        on_gpu.test_rotated_blocks_of_any_codes_and_scales_decode_as_the_reference_has_them(codec, dtype)


def test_rounding_of_ties() -> None:
    on_gpu.test_ties_and_their_neighbours_are_rounded_as_the_reference_does()


def test_blocks_at_the_bounds_of_what_has_a_scale() -> None:
    on_gpu.test_blocks_at_the_bounds_of_what_has_a_scale()


@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_the_mean_of_any_number_of_payloads(ranks: int) -> None:
    on_gpu.test_the_mean_of_any_number_of_payloads_is_that_of_the_reference(ranks)


@pytest.mark.parametrize("feedback", [True, False])
def test_which_kernels_take_which_blocks(feedback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu.test_whole_blocks_go_to_the_fast_kernels(feedback, monkeypatch)
