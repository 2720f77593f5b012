"""Kernels of the fused step on the CPU: byte for byte what the codec and IEEE arithmetic in NumPy give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebit.comm import Part
from onebit.compress import SignCodec, set_num_threads
from onebit.optim.cpu import momentum as kernels
from onebit.optim.kernels import Momentum, step_kernels
from tests.compress.samples import mask_of, residual_of, values

Floats = npt.NDArray[np.float32]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 31, 32, 33, 1024, 1025, 3000, 96)
FACTORS: dict[str, Any] = {"beta1": 0.9, "alpha": 0.1, "l2": 0.0}
CPU = torch.device("cpu")


@dataclass
class Sample:
    """A bucket with what a step of it reads and writes; `codec` is the reference that the results are compared with."""

    codec: SignCodec
    part: Part
    grads: list[Tensor | None]
    momenta: list[Tensor]
    payload: Tensor
    params: list[Tensor]
    masters: list[Tensor | None]
    variances: list[Tensor]
    scalars: Tensor

    def momentum(self, kind: str) -> Momentum:
        return self.payload if kind == "payload" else self.momenta


def sample(
    block_size: int | None = 1024,
    scale: Any = "mean",
    masked: bool = False,
    chunks: int = 2,
    numels: Sequence[int] = NUMELS,
    kind: str = "mixed",
    seed: int = 0,
) -> Sample:
    """Tensors of every dtype beside each other; the momentum is one that was decoded."""
    generator = torch.Generator().manual_seed(seed)
    codec = SignCodec(block_size=block_size, scale=scale, kernels="reference")
    (layout,) = codec.plan(numels, chunks)
    mask = mask_of(layout, seed) if masked else None
    dtypes = [DTYPES[(i + seed) % 3] for i in range(len(numels))]
    grads: list[Tensor | None] = [
        None if i % 5 == 4 else values(kind, n, DTYPES[(i // 2 + seed) % 3], generator) for i, n in enumerate(numels)
    ]
    params = [values("normal", n, dtype, generator) for n, dtype in zip(numels, dtypes, strict=True)]
    masters = [p.float() * 1.001 if p.dtype != torch.float32 and i % 2 else None for i, p in enumerate(params)]
    payload = torch.zeros(chunks * layout.payload_bytes, dtype=torch.uint8)
    old = [values("normal", n, torch.float32, generator) for n in numels]
    codec.encode(old, None, layout=layout, mask=mask, out=payload)
    momenta = [torch.empty(n) for n in numels]
    codec.decode(payload, momenta, layout=layout, mask=mask)
    residual = residual_of(layout, seed)
    for s in layout.segments:  # what is masked holds no residual
        residual[layout.residual_span(s)] *= momenta[s.tensor][s.offset : s.offset + s.numel] != 0
    part = Part(
        layout=layout,
        used=tuple(range(len(numels))),
        residual=residual,
        mask=mask,
        sent=torch.zeros_like(payload),
        gathered=torch.zeros_like(payload),
        squared=scale == "rms",
    )
    codec.encode(
        [values("normal", n, torch.float32, generator) for n in numels], None, layout=layout, out=part.gathered
    )
    variances = [values("normal", n, torch.float32, generator) ** 2 for n in numels]
    scalars = torch.rand(len(numels), 3, generator=generator) + 0.5
    return Sample(codec, part, grads, momenta, payload, params, masters, variances, scalars)


def local(s: Sample, beta1: float, alpha: float, l2: float) -> list[Tensor]:
    """β₁·m + α·(g + l2·p), each operation rounded to fp32, in the documented order."""
    results = []
    for m, g, p in zip(s.momenta, s.grads, s.params, strict=True):
        c: Floats = np.zeros(m.numel(), np.float32) if g is None else g.float().numpy()
        with np.errstate(all="ignore"):
            if l2:
                c = (c + np.float32(l2) * p.float().numpy()).astype(np.float32)  # fp32 already
            results.append(torch.from_numpy(np.float32(beta1) * m.numpy() + np.float32(alpha) * c))
    return results


@pytest.mark.parametrize("source", ["fp32", "payload"])
@pytest.mark.parametrize("l2", [0.0, -0.03])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("block_size", "scale"), [(1024, "mean"), (32, "rms"), (96, "mean"), (None, "mean")])
def test_a_local_momentum_is_encoded_to_the_codecs_own_bytes(
    source: str, l2: float, masked: bool, block_size: int | None, scale: str
) -> None:
    s = sample(block_size, scale, masked)
    residual, sent = s.part.residual.clone(), torch.zeros_like(s.part.sent)
    wanted = local(s, 0.9, -0.1, l2)
    s.codec.encode(wanted, residual, layout=s.part.layout, mask=s.part.mask, out=sent)
    kernels.encode_momentum(s.part, s.grads, s.momentum(source), s.params, beta1=0.9, alpha=-0.1, l2=l2)
    assert s.part.sent.equal(sent)
    assert s.part.residual.view(torch.int32).equal(residual.view(torch.int32))


@pytest.mark.parametrize("source", ["fp32", "payload"])
@pytest.mark.parametrize("l2", [0.0, -0.03])
@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("block_size", [1024, 96])
def test_a_local_momentum_is_written_in_the_order_of_blocks_to_wherever_a_chunk_is(
    source: str, l2: float, past_cache: bool, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "STREAM_BYTES", 0 if past_cache else 1 << 40)
    s = sample(block_size, masked=True, chunks=3, kind="mixed")
    layout = s.part.layout
    out = list(torch.full((3, layout.chunk_numel), 7.0))[::-1]
    kernels.write_momentum(s.part, out, s.grads, s.momentum(source), s.params, beta1=0.9, alpha=-0.1, l2=l2)
    written, wanted = torch.cat(out), local(s, 0.9, -0.1, l2)
    for segment in layout.segments:
        got = written[layout.residual_span(segment)]
        right = wanted[segment.tensor][segment.offset : segment.offset + segment.numel]
        live = s.momenta[segment.tensor][segment.offset : segment.offset + segment.numel] != 0  # else it is masked
        assert got[live].view(torch.int32).equal(right[live].view(torch.int32))


def test_what_the_codec_has_encoded_is_undone_as_the_numbers_that_it_was() -> None:
    """Average on two levels encode a node's mean, and no local momentum."""
    s = sample(masked=True, kind="poisoned")
    mean = [values("poisoned", n, torch.float32, torch.Generator().manual_seed(n)) for n in NUMELS]
    before = s.part.residual.clone()
    s.codec.encode(mean, s.part.residual, layout=s.part.layout, mask=s.part.mask, out=s.part.sent)
    after = s.part.residual.clone()
    kernels.undo_encode(s.part, mean, mean, (), beta1=0.0, alpha=1.0, l2=0.0, proceed=torch.tensor(True))
    assert s.part.residual.view(torch.int32).equal(after.view(torch.int32))
    kernels.undo_encode(s.part, mean, mean, (), beta1=0.0, alpha=1.0, l2=0.0)
    torch.testing.assert_close(s.part.residual, before, rtol=0, atol=4 * 8 * 2.0**-23)  # rounded as above
    assert not after.equal(before)


@settings(max_examples=25, deadline=None)
@given(
    numels=st.lists(st.integers(0, 2500), min_size=1, max_size=5),
    kind=st.sampled_from(["normal", "sparse", "zeros", "denormal", "huge", "poisoned", "mixed"]),
    masked=st.booleans(),
    chunks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_gradients_give_equal_bits_from_both_forms_of_the_momentum(
    numels: list[int], kind: str, masked: bool, chunks: int, seed: int
) -> None:
    """The exact resume depends on it: a loaded momentum is in fp32, a running one is signs and scales."""
    results = []
    for source in ("fp32", "payload"):
        s = sample(masked=masked, chunks=chunks, numels=numels, kind=kind, seed=seed)
        wanted, residual = local(s, **FACTORS), s.part.residual.clone()
        sent = torch.zeros_like(s.part.sent)
        s.codec.encode(wanted, residual, layout=s.part.layout, mask=s.part.mask, out=sent)
        kernels.encode_momentum(s.part, s.grads, s.momentum(source), s.params, **FACTORS)
        assert s.part.sent.equal(sent)
        results.append((s.part.sent, s.part.residual.view(torch.int32), residual.view(torch.int32)))
    assert results[0][0].equal(results[1][0])
    assert results[0][1].equal(results[1][1])
    assert results[0][1].equal(results[0][2])


@pytest.mark.parametrize("source", ["fp32", "payload"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block_size", [1024, 96, None])
def test_undo_puts_error_feedback_back_and_leaves_what_said_nan(
    source: str, masked: bool, block_size: int | None
) -> None:
    s = sample(block_size, masked=masked, kind="poisoned")
    before = s.part.residual.clone()
    factors = {**FACTORS, "l2": 0.03}
    arguments = (s.part, s.grads, s.momentum(source), s.params)
    kernels.encode_momentum(*arguments, **factors)
    after = s.part.residual.clone()
    kernels.undo_encode(*arguments, **factors, proceed=torch.tensor(True))
    assert s.part.residual.view(torch.int32).equal(after.view(torch.int32))
    kernels.undo_encode(*arguments, **factors, proceed=torch.tensor(False))
    # The largest number met is c or the scale, of a few units here; each of four operations rounds once.
    torch.testing.assert_close(s.part.residual, before, rtol=0, atol=4 * 8 * 2.0**-23)
    assert not after.equal(before)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("block_size", "eps"), [(1024, 1e-8), (96, 1e-3), (None, 0.0)])
def test_an_update_is_adams_with_every_operation_rounded_once(masked: bool, block_size: int | None, eps: float) -> None:
    s = sample(block_size, masked=masked)
    m = [torch.empty(n) for n in NUMELS]
    s.codec.decode(s.part.gathered, m, layout=s.part.layout)
    dead = [torch.ones(n) for n in NUMELS]
    s.codec.decode(s.part.gathered, dead, layout=s.part.layout, mask=s.part.mask)
    masters = [None if t is None else t.clone() for t in s.masters]
    expected = []
    for i, p in enumerate(s.params):
        source = masters[i]
        w = (p if source is None else source).float().numpy()
        rate, root, keep = (np.float32(x) for x in s.scalars[i].tolist())
        kept = w * keep
        with np.errstate(all="ignore"):
            spread = np.sqrt(s.variances[i].numpy()) * root + np.float32(eps)
            moved = kept - (rate * m[i].numpy()) / spread
        expected.append(torch.from_numpy(np.where(dead[i].numpy() == 0, kept, moved)))
    momentum = torch.zeros_like(s.part.gathered)
    untouched = [p.clone() for p in s.params]
    update = (s.part, s.params, s.masters, s.variances, momentum, s.scalars)
    kernels.decode_update(*update, eps=eps, proceed=torch.tensor(False))
    assert all(p.equal(q) for p, q in zip(s.params, untouched, strict=True))
    assert not momentum.any()
    kernels.decode_update(*update, eps=eps, proceed=torch.tensor(True))
    assert momentum.equal(s.part.gathered)
    for p, master, right in zip(s.params, s.masters, expected, strict=True):
        assert p.equal(right.to(p.dtype))
        assert master is None or master.equal(right)


def test_scalars_are_those_of_adam_and_count_a_step() -> None:
    steps, variance_steps = torch.tensor([0.0, 9.0, 99999.0]), torch.tensor([1.0, 5.0, 7.0])
    scalars = torch.zeros(3, 3)
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1}
    arguments = (steps, variance_steps, scalars)
    kernels.adam_scalars(*arguments, **options, bias_correction=True, proceed=torch.tensor(False))
    assert steps.tolist() == [0, 9, 99999]
    assert not scalars.any()
    kernels.adam_scalars(*arguments, **options, bias_correction=True)
    assert steps.tolist() == [1, 10, 100000]
    expected = [[0.01 / (1 - 0.9**t), (1 - 0.999**T) ** -0.5, 1 - 0.01 * 0.1] for t, T in ((1, 1), (10, 5), (1e5, 7))]
    assert scalars.tolist() == torch.tensor(expected, dtype=torch.float32).tolist()
    kernels.adam_scalars(*arguments, **{**options, "lr": torch.tensor(0.5)}, bias_correction=False)
    assert scalars.tolist() == torch.tensor([[0.5, 1.0, 1 - 0.5 * 0.1]] * 3).tolist()


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    results = []
    try:
        for threads in (1, 3):
            set_num_threads(threads)
            s = sample(numels=(300_000, 70_001))
            kernels.encode_momentum(s.part, s.grads, s.payload, s.params, **FACTORS)
            kernels.decode_update(s.part, s.params, s.masters, s.variances, s.payload, s.scalars, eps=1e-8)
            results.append((s.part.sent, s.part.residual, *s.params))
    finally:
        set_num_threads(None)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_the_codec_decides_which_kernels_there_are() -> None:
    chosen = step_kernels(CPU, SignCodec())
    assert chosen is not None
    assert chosen.name == "cpu"
    assert step_kernels(CPU, SignCodec(kernels="reference")) is None
