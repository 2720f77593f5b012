"""What kernels are measured against: parallel copies, and the chain of torch ops + `numpy.packbits`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.truth import SignTruth
from onebit.compress import SignCodec


@dataclass
class Copy:
    """A source and a destination of (numel,) elements, and the threads that a NumPy copy is split over."""

    source: Tensor
    target: Tensor
    pool: ThreadPoolExecutor
    pieces: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def _copy_inputs(setting: Setting) -> Copy:
    source = setting.normal()
    return Copy(source, torch.zeros_like(source), ThreadPoolExecutor(setting.threads))


def _split_inputs(setting: Setting) -> Copy:
    state = _copy_inputs(setting)
    words = [np.array_split(t.view(torch.uint8).numpy(), setting.threads) for t in (state.source, state.target)]
    state.pieces = list(zip(*words, strict=True))
    return state


def _copy_torch(state: Copy) -> None:
    state.target.copy_(state.source)


def _copy_numpy(state: Copy) -> None:
    list(state.pool.map(lambda piece: np.copyto(piece[1], piece[0]), state.pieces))


def _check_copy(state: Copy) -> Callable[[], int]:
    state.target.zero_()
    return lambda: int((state.target != state.source).sum())


@dataclass
class Chain:
    """x, residual: (blocks, block); payload: what the last run produced."""

    x: Tensor
    residual: Tensor
    numel: int
    payload: Tensor


def _chain_inputs(setting: Setting) -> Chain:
    block = setting.codec.block_size or setting.numel
    x = torch.nn.functional.pad(setting.normal(), (0, -setting.numel % block)).view(-1, block)
    return Chain(x, torch.zeros_like(x, dtype=torch.float32), setting.numel, torch.empty(0, dtype=torch.uint8))


def _chain_run(state: Chain) -> None:
    """Sum, scale, compare, pack, subtract: each a pass over memory of its own."""
    total = state.x + state.residual
    scale = total.abs().mean(dim=1, keepdim=True, dtype=torch.float32)
    positive = total >= 0
    bits = torch.from_numpy(np.packbits(positive.numpy(), axis=None, bitorder="little"))
    state.payload = torch.cat([bits, scale.view(-1).view(torch.uint8)])
    state.residual = total - torch.where(positive, scale, -scale)


def _check_chain(state: Chain) -> Callable[[], int]:
    sums = (state.x + state.residual).view(-1)

    def wrong() -> int:
        block = state.x.shape[1]
        whole = state.numel // block * block  # the chain takes padding into the scale of a last, partial block
        truth = SignTruth(state.numel, block)
        return truth.wrong_encoding(sums[:whole], state.residual.view(-1)[:whole], state.payload)

    return wrong


def _copied(setting: Setting) -> float:
    return 2.0 * setting.numel * setting.dtype.itemsize


def encoded(setting: Setting) -> float:
    """Read x and the residual, write the residual, where errors are kept, and the payload."""
    return setting.numel * (setting.dtype.itemsize + kept(setting)) + packed(setting)


def kept(setting: Setting) -> int:
    """Bytes of an element's residual that are read and written."""
    return 8 if setting.codec.error_feedback else 0


def packed(setting: Setting) -> float:
    """Bytes of one payload: a few bits an element and a float32 a block."""
    return setting.numel * setting.codec.bits / 8 + 4 * -(-setting.numel // (setting.codec.block_size or setting.numel))


YARDSTICKS: tuple[Case[Copy] | Case[Chain], ...] = (
    Case(
        name="copy-torch",
        summary="Tensor.copy_, on torch's threads",
        family="kernels",
        role="copy",
        capturable=True,
        moved=_copied,
        inputs=_copy_inputs,
        run=_copy_torch,
        check=_check_copy,
    ),
    Case(
        name="copy-numpy",
        summary="numpy.copyto, split over as many threads",
        family="kernels",
        role="copy",
        devices=("cpu",),
        moved=_copied,
        inputs=_split_inputs,
        run=_copy_numpy,
        check=_check_copy,
    ),
    Case(
        name="chain",
        summary="the torch ops and numpy.packbits that encode replaces",
        family="kernels",
        role="chain",
        devices=("cpu",),
        codecs=(SignCodec,),
        moved=encoded,
        inputs=_chain_inputs,
        run=_chain_run,
        check=_check_chain,
    ),
)
