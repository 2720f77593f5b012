"""Mixed precision in a training loop: autocast, torch.amp.GradScaler, accumulation and clipping, each optimizer."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from onebit.comm import Backend, run_threads
from onebit.optim import clip_grad_norm_
from tests.comm.samples import bits
from tests.optim.loops import KINDS, STEPS, assert_equal_on_ranks, backward, loss_of, make, network, settled, test_error
from tests.optim.samples import contents

LONG = 80
LATER = {"OnebitAdam": {"freeze_step": 20}, "OnebitLamb": {"freeze_step": 20}, "ZeroOneAdam": {"var_freeze_step": 20}}


def autocast_run(backend: Backend, kind: str, dtype: torch.dtype) -> tuple[float, int, list[int]]:
    """The error after LONG steps that were made, the number of skipped ones and the scales' exponents."""
    model = network()
    optimizer = make(kind, model.parameters(), backend, lr=2e-2, **LATER[kind])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, LONG)
    # A growth every sixth step soon gives a scale at which fp16 overflows, so that there are steps to skip.
    scaler = GradScaler("cpu", init_scale=2.0**14, growth_interval=6, enabled=dtype == torch.float16)
    scales: list[int] = []
    number = 0
    while number < LONG:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, backend.rank, number)
        backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        if len(scales) - optimizer.skipped_steps == number:  # a skipped step is made again with the same data
            number += 1
            schedule.step()
        scales.append(round(float(torch.tensor(scaler.get_scale()).log2())))
    settled(optimizer)
    assert_equal_on_ranks(backend, list(model.parameters()))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return test_error(model), optimizer.skipped_steps, scales


@lru_cache
def in_fp32(kind: str) -> float:
    return run_threads(2, autocast_run, kind, torch.float32)[0][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_trains_as_fp32_does_and_ranks_stay_equal(kind: str, dtype: torch.dtype) -> None:
    for error, skipped, scales in run_threads(2, autocast_run, kind, dtype):
        # bf16 rounds activations to a part in 256: after 80 steps about a per cent of the error.
        assert error == pytest.approx(in_fp32(kind), rel=0.06)
        assert error < 0.5 * test_error(network())
        assert bool(skipped) == (dtype == torch.float16)
        if dtype == torch.float16:
            assert max(scales) > scales[0], "the scale has grown"
            assert min(b - a for a, b in pairwise(scales)) == -1, "and has been taken back"


@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_scaled_and_clipped_gradients_make_the_steps_of_unscaled_ones_bit_for_bit(
    kind: str, world_size: int, clipped: bool
) -> None:
    def train(backend: Backend) -> None:
        scaled, plain = network(), network()
        optimizers = [make(kind, model.parameters(), backend) for model in (scaled, plain)]
        scaler = GradScaler("cpu", init_scale=2.0**6, growth_interval=4)  # powers of two change no bit
        norms: list[list[Tensor]] = [[], []]
        for number in range(STEPS):
            for micro in range(3):
                backward(scaler.scale(loss_of(scaled, backend.rank, 3 * number + micro) / 3))
                backward(loss_of(plain, backend.rank, 3 * number + micro) / 3)
            if clipped:
                scaler.unscale_(optimizers[0])
                for seen, optimizer in zip(norms, optimizers, strict=True):
                    seen.append(clip_grad_norm_(optimizer, 0.05))
            scaler.step(optimizers[0])
            scaler.update()
            optimizers[1].step()
            assert contents(optimizers[0]) == contents(optimizers[1])
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert bits(norms[0]) == bits(norms[1])
        assert not clipped or max(norms[0]) > 0.05
        assert scaler.get_scale() == 2.0 ** (6 + STEPS // 4)

    run_threads(world_size, train)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_under_autocast_and_a_scaler_is_that_of_torch_under_the_same(kind: str) -> None:
    """On one rank, where torch's own AdamW sees the same gradients; LAMB is AdamW once all coefficients are 1."""
    if kind == "OnebitLamb":
        options: dict[str, Any] = {"freeze_step": 100, "min_coeff": 1.0, "max_coeff": 1.0, "weight_decay": 0.0}
    else:
        options = {"freeze_step": 100} if kind == "OnebitAdam" else {"var_freeze_step": 100, "var_update_scaler": 100}
    ours, torchs = network(), network()
    optimizer = make(kind, ours.parameters(), "single", **options)
    adamw = torch.optim.AdamW(
        torchs.parameters(), lr=1e-2, eps=optimizer.defaults["eps"], weight_decay=optimizer.defaults["weight_decay"]
    )
    scalers = [GradScaler("cpu", init_scale=2.0**15, growth_interval=3) for _ in range(2)]
    for number in range(STEPS):
        for model, stepped, scaler in zip((ours, torchs), (optimizer, adamw), scalers, strict=True):
            stepped.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, 0, number)
            backward(scaler.scale(loss))
            scaler.step(stepped)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    for made, expected in zip(ours.parameters(), torchs.parameters(), strict=True):
        # LAMB and 0/1 Adam round a step of 1e-2 in other places, and fp16 can make a unit of its own, a thousandth of
        # an activation, of a difference in the last bit.
        torch.testing.assert_close(made, expected, rtol=0, atol=0 if kind == "OnebitAdam" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_parameters_with_masters_follow_fp32_ones(kind: str) -> None:
    """A model that was cast as a whole, as in pure bf16 training."""

    def train(backend: Backend, dtype: torch.dtype) -> float:
        model = network().to(dtype)
        optimizer = make(kind, model.parameters(), backend, lr=2e-2, master_weights=True, **LATER[kind])
        for number in range(LONG):
            optimizer.zero_grad()
            backward(loss_of(lambda x: model(x.to(dtype)), backend.rank, number))
            optimizer.step()
        settled(optimizer)
        return test_error(nn.Sequential(Cast(dtype), model))

    full, half = (run_threads(2, train, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert half == pytest.approx(full, rel=0.06)  # activations of a part in 256, as above


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)
