"""Every optimizer takes every codec: the same bits on all ranks, a loss that falls, and a state that is carried on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, run_threads
from onebit.compress import Codec, Fp8Codec, InputError, Int4Codec, Int8Codec, SignCodec
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.comm.samples import bits, normal, state_bits

CODECS: dict[str, Codec] = {
    "int8": Int8Codec(block_size=64),
    "int4": Int4Codec(block_size=64, rounding="stochastic", rotate=True),
    "int8 alone": Int8Codec(block_size=64, rounding="stochastic", error_feedback=False),
    "fp8": Fp8Codec(block_size=64),
}
MAKERS: dict[str, Callable[..., Any]] = {
    "OnebitAdam": lambda params, **options: OnebitAdam(params, lr=0.05, weight_decay=0.0, freeze_step=10, **options),
    "OnebitLamb": lambda params, **options: OnebitLamb(params, lr=0.05, weight_decay=0.0, freeze_step=10, **options),
    "ZeroOneAdam": lambda params, **options: ZeroOneAdam(
        params, lr=0.05, weight_decay=0.0, var_freeze_step=10, **options
    ),
}
STEPS = 150


class Quadratic:
    """Two parameters pulled to a target by gradients of which every rank has a noisy part."""

    def __init__(self, maker: str, backend: Backend | None, codec: Codec | None) -> None:
        self.params = [torch.nn.Parameter(normal(1, i, numel=n)) for i, n in enumerate((300, 70))]
        self.targets = [normal(2, i, numel=p.numel()) for i, p in enumerate(self.params)]
        self.rank = 0 if backend is None else backend.rank
        self.optimizer = MAKERS[maker](self.params, backend=backend, codec=codec)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for i, (p, target) in enumerate(zip(self.params, self.targets, strict=True)):
                noise = 0.1 * normal(3, self.rank, step, i, numel=p.numel())
                p.grad = (p.detach() - target) * (0.5 + self.rank) + noise
            self.optimizer.step()

    @property
    def loss(self) -> float:
        return sum(float((p.detach() - t).square().sum()) for p, t in zip(self.params, self.targets, strict=True))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", CODECS)
def test_ranks_stay_equal_and_the_loss_falls(name: str, maker: str) -> None:
    def trained(backend: Backend) -> tuple[list[bytes], float, str, dict[str, Any]]:
        run = Quadratic(maker, backend, CODECS[name])
        before = run.loss
        run.train(0, STEPS)
        metrics = run.optimizer.metrics(compression_error=True)
        return bits(run.params), run.loss / before, run.optimizer.kernels, metrics

    one, other = run_threads(2, trained)
    assert one[0] == other[0]
    assert one[1] < 0.2
    assert one[2] == "torch"
    if not CODECS[name].error_feedback:
        assert one[3]["residual_norm"] == 0
        assert "compression_error" not in one[3]


@pytest.mark.parametrize("codec", [Int8Codec(), Fp8Codec()])
def test_one_rank_is_the_uncompressed_algorithm(codec: Codec) -> None:
    run, expected = Quadratic("OnebitAdam", None, codec), Quadratic("OnebitAdam", None, None)
    torchs = [torch.nn.Parameter(p.detach().clone()) for p in run.params]
    adamw = torch.optim.AdamW(torchs, lr=0.05, weight_decay=0.0)
    run.train(0, 30)
    expected.train(0, 30)
    assert bits(run.params) == bits(expected.params)
    short = Quadratic("OnebitAdam", None, codec)
    for step in range(10):  # until the variance is frozen it is torch's
        short.train(step, step + 1)
        for p, q in zip(torchs, short.params, strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        adamw.step()
    assert bits(torchs) == bits(short.params)


@pytest.mark.parametrize("name", ["int4", "int8 alone"])
def test_a_run_that_is_resumed_continues_bit_for_bit(name: str) -> None:
    def resumed(backend: Backend) -> tuple[list[bytes], list[bytes]]:
        whole = Quadratic("OnebitAdam", backend, CODECS[name])
        whole.train(0, 40)
        half = Quadratic("OnebitAdam", backend, CODECS[name])
        half.train(0, 25)
        saved, values = copy.deepcopy(half.optimizer.state_dict()), [p.detach().clone() for p in half.params]
        again = Quadratic("OnebitAdam", backend, CODECS[name])
        for p, value in zip(again.params, values, strict=True):
            p.data.copy_(value)
        again.optimizer.load_state_dict(saved)
        again.train(25, 40)
        return bits(whole.params), bits(again.params)

    for whole, again in run_threads(2, resumed):
        assert whole == again


def test_a_checkpoint_is_carried_on_by_another_codec() -> None:
    """The feedback belongs to elements, not to a codec, as long as blocks are the same."""

    def carried(backend: Backend) -> tuple[Any, Any, float]:
        run = Quadratic("OnebitAdam", backend, SignCodec(block_size=64))
        run.train(0, 40)
        saved = copy.deepcopy(run.optimizer.state_dict())
        other = Quadratic("OnebitAdam", backend, Int8Codec(block_size=64))
        other.optimizer.load_state_dict(saved)
        kept = state_bits(other.optimizer.state_dict()["onebit"]["residuals"])
        other.train(40, STEPS)
        return state_bits(saved["onebit"]["residuals"]), kept, other.loss

    for saved, kept, loss in run_threads(2, carried):
        assert saved == kept
        assert loss < 100  # from 740


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("codec", [Int8Codec(error_feedback=False), Fp8Codec(error_feedback=False)])
def test_a_codec_that_loses_small_elements_for_good_is_refused(codec: Codec, maker: str) -> None:
    with pytest.raises(InputError, match="give error_feedback=True, or, where the codec has it, rounding='stochastic'"):
        MAKERS[maker]([torch.nn.Parameter(torch.ones(3))], codec=codec)


def test_what_is_refused_would_stand_still() -> None:
    """The reason: gradients of 0.002 beside one of about 1 never move a momentum that is rounded to steps of 1/127."""

    def momenta(codec: Codec) -> Tensor:
        m, g, seen = torch.zeros(32), torch.full((32,), 0.002), []
        for step in range(1000):
            g[0] = 1 + 0.1 * float(normal(4, step, numel=1).clamp(-2, 2))  # so that no step draws as the one before
            said = codec.decode(codec.encode(0.9 * m + 0.1 * g), numel=32)
            assert isinstance(said, Tensor)
            m = said
            seen.append(m[1:])
        return torch.stack(seen[100:])

    assert momenta(Int8Codec(error_feedback=False)).eq(0).all()
    drawn = momenta(Int8Codec(error_feedback=False, rounding="stochastic"))
    # A draw scatters by up to half a step of 0.008 and is forgotten in 10 steps, which adds up to 0.008 at one time;
    # 900 steps of 31 elements are some 2800 times: five standard deviations are 0.0008.
    assert abs(float(drawn.mean()) - 0.002) < 0.0008
