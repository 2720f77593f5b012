"""Masked elements have no part in an average, and masks that do not fit are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, InputError, run_threads
from onebit.compress import SignCodec
from tests.comm import oracle
from tests.comm.oracle import tolerance
from tests.comm.samples import CODECS, arrays, bits, normal


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_masked_elements_count_for_nothing_and_become_zero(world_size: int, codec: SignCodec) -> None:
    masks = [normal(5) < 0.0, torch.ones(100, dtype=torch.bool), torch.zeros(70, dtype=torch.bool)]
    numels = [m.numel() for m in masks]

    def inputs(rank: int, call: int) -> list[Tensor]:
        tensors = [normal(rank, call, i, numel=n) for i, n in enumerate(numels)]
        tensors[0][masks[0]] = 1e30  # would drown every scale
        return tensors

    def check(backend: Backend) -> list[Tensor]:
        reduce = CompressedAllreduce(inputs(0, 0), backend, codec)
        reduce.set_mask(masks)
        outputs = []
        for call in range(3):
            tensors = inputs(backend.rank, call)
            reduce(tensors)
            outputs += tensors
        if world_size > 1:
            worker = torch.split(reduce.state_dict()["worker"], numels)
            assert all(bool((w[m] == 0).all()) for w, m in zip(worker, masks, strict=True))
        reduce.set_mask(None)
        tensors = inputs(backend.rank, 3)
        reduce(tensors)
        assert bool((tensors[1] != 0).all())
        return outputs

    per_rank = run_threads(world_size, check)
    expected = oracle.CompressedMean(world_size, numels, codec.block_size, codec.scale, [m.numpy() for m in masks])
    for call in range(3):
        means = expected([arrays(inputs(rank, call)) for rank in range(world_size)])
        for outputs in per_rank:
            for mean, mask, out in zip(means, masks, outputs[3 * call :], strict=False):
                assert bool((out[mask] == 0).all())
                assert np.abs(arrays([out])[0] - mean).max() <= tolerance(world_size, call, 10.0)  # no |c| is above 10


def test_wrong_masks_are_refused_and_the_average_goes_on_without() -> None:
    def check(backend: Backend) -> list[bytes]:
        reduce = CompressedAllreduce([torch.empty(3000), torch.empty(7)], backend)
        wrong: list[tuple[list[Tensor], str]] = [
            ([torch.zeros(3000, dtype=torch.bool)], "expected 2 masks"),
            ([torch.ones(3000), torch.ones(7)], "bool"),
            ([torch.ones(3000, dtype=torch.bool), torch.ones(6, dtype=torch.bool)], "6 elements"),
        ]
        for masks, message in wrong:
            with pytest.raises(InputError, match=message):
                reduce.set_mask(masks)
        tensors = [normal(backend.rank), normal(backend.rank, numel=7)]
        reduce(tensors)
        return bits(tensors)

    def plain(backend: Backend) -> list[bytes]:
        tensors = [normal(backend.rank), normal(backend.rank, numel=7)]
        CompressedAllreduce(tensors, backend)(tensors)
        return bits(tensors)

    assert run_threads(2, check) == run_threads(2, plain)
