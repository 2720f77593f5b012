"""The mean over ranks that is encoded as it is taken has the bytes of one that is taken first."""

from __future__ import annotations

import pytest
import torch

from onebit.compress import SignCodec, reference
from onebit.compress.cpu.mean import encode_mean
from tests.compress.samples import mask_of, residual_of, tensors

NUMELS = (1, 0, 31, 32, 33, 1024, 1025, 3000, 0, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [32, 96, 1024])
@pytest.mark.parametrize(("ranks", "place"), [(2, 0), (2, 1), (3, 1), (4, 3), (7, 2)])
def test_its_bytes_and_residual_are_those_of_the_reference(
    ranks: int, place: int, block_size: int, dtype: torch.dtype
) -> None:
    for seed, (squared, feedback, masked) in enumerate(
        ((False, True, False), (True, True, True), (False, False, True))
    ):
        layout = SignCodec(block_size=block_size).plan(NUMELS, 2)[0]
        given = tensors(NUMELS, dtype, seed)
        rows = [torch.randn(layout.padded_numel, generator=torch.Generator().manual_seed(r)) for r in range(1, ranks)]
        rows[0][5] = torch.inf
        residual = residual_of(layout, seed) if feedback else None
        mask = mask_of(layout, seed) if masked else None

        means = []
        for tensor, x in enumerate(given):
            mean = torch.zeros(x.numel())
            for s in (s for s in layout.segments if s.tensor == tensor):
                at = slice(s.offset, s.offset + s.numel)
                parts = [row[layout.residual_span(s)] for row in rows]
                parts.insert(place, x[at].float())
                mean[at] = parts[0]
                for part in parts[1:]:
                    mean[at] += part
            means.append(mean / torch.tensor(float(ranks)))
        kept = None if residual is None else residual.clone()
        expected = torch.zeros(layout.chunks * layout.payload_bytes, dtype=torch.uint8)
        reference.encode(means, kept, mask, expected, layout, squared)

        out = torch.zeros_like(expected)
        encode_mean(given, rows, place, residual, mask, out, layout, squared)
        assert torch.equal(out, expected)
        if residual is not None:
            assert torch.equal(residual.view(torch.int32), kept.view(torch.int32))
