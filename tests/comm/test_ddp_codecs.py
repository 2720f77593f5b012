"""The DDP hook takes any codec, with error feedback and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from onebit.comm import Backend, CompressedAllreduce
from onebit.comm.ddp import compress_gradients
from onebit.compress import Codec, Fp8Codec, Int4Codec, Int8Codec
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, normal

CODECS: list[Codec] = [
    Int8Codec(error_feedback=False),
    Int4Codec(block_size=64, rounding="stochastic", rotate=True),
    Fp8Codec(block_size=64),
]


def gradients(backend: Backend, codec: Codec) -> tuple[list[bytes], list[bytes], bool]:
    """Means by the hook and by an average of the same gradients, after three steps; whether feedback is kept."""

    def made() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5))

    model, twin = made(), made()
    wrapped = DistributedDataParallel(model)
    hook = compress_gradients(wrapped, codec)
    own: list[Tensor] = []
    reduce = None
    for step in range(3):
        x = normal(backend.rank, step, numel=240).view(8, 30)
        for trained in (wrapped, twin):
            trained.zero_grad()
            trained(x).square().sum().backward()
        own = [p.grad for p in twin.parameters() if p.grad is not None]
        reduce = reduce or CompressedAllreduce(own, backend, codec)
        reduce(own)
    hooked = [p.grad for p in model.parameters() if p.grad is not None]
    return bits(hooked), bits(own), "worker" in hook.state_dict()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_gradients_are_the_compressed_means(codec: Codec) -> None:
    one, other = run_ranks("gloo", 2, gradients, codec)
    assert one[0] == other[0] == one[1] == other[1]
    assert one[2] is codec.error_feedback
