"""The CUDA sources, run on the CPU, make steps on slices of the state as the kernels of the CPU do."""

from __future__ import annotations

import pytest

from onebit.comm import run_threads
from onebit.compress import Codec, SignCodec
from tests.optim.settling_on_cpu import settle_by_cuda_sources
from tests.optim.sharded_runs import CODEC, train
from tests.optim.test_shard import assert_same
from tests.optim.warps_on_cpu import COMPILER, kernels_on_cpu

__all__ = ["kernels_on_cpu"]

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no g++"), pytest.mark.usefixtures("kernels_on_cpu")]

WHOLE = SignCodec()  # blocks of 1024 elements, of which the fast kernels take those that are full


@pytest.mark.parametrize(
    ("run", "codec"),
    [
        ("not finite", CODEC),
        ("fp16 with masters, dead entries", CODEC),
        ("fp16 with masters, dead entries", WHOLE),
        ("bf16, decay in the gradient", WHOLE),
        ("refreshed, first gradients late", WHOLE),
    ],
)
def test_slices_move_as_by_the_kernels_of_the_cpu(run: str, codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_threads(4, train, run, False, {"codec": codec})
    used = settle_by_cuda_sources(monkeypatch)
    assert_same(expected, run_threads(4, train, run, True, {"codec": codec}))
    assert used == {"gpu"}
