"""The fused step of 1-bit Adam on CPU tensors: addresses out to the compiled loops; see `optim.kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.comm import Part
from onebit.compress import SignCodec
from onebit.compress.cpu.launch import CODES, address, addresses, launch
from onebit.compress.cpu.operators import STREAM_BYTES, visit_blocks
from onebit.compress.layout import Layout
from onebit.optim.cpu import momentum_blocks
from onebit.optim.kernels import Momentum

name = "cpu"


def supports(codec: SignCodec) -> bool:
    """As `StepKernels.supports`: whatever a `SignCodec` can be."""
    return isinstance(codec, SignCodec)


def encode_momentum(
    part: Part,
    grads: Sequence[Tensor | None],
    momentum: Momentum,
    params: Sequence[Tensor],
    *,
    beta1: float,
    alpha: float,
    l2: float,
) -> None:
    """As `StepKernels.encode_momentum`."""
    layout = part.layout
    source = _Source(grads, momentum, params, (beta1, alpha, l2))
    sums = np.zeros((layout.blocks if layout.shared_scale else 0, 3), np.float32)

    def run(stage: int) -> None:
        launch(
            momentum_blocks.encode_momentum_blocks,
            layout.blocks,
            layout.block_size,
            *source.arguments(),
            *_tables(layout),
            address(part.residual),
            address(part.mask),
            address(part.sent),
            *_sizes(layout),
            part.squared,
            stage,
            sums.ctypes.data,
        )

    visit_blocks(run, part.sent.view(layout.chunks, -1), sums, layout, layout.scale_groups(), part.squared)


def write_momentum(
    part: Part,
    out: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum: Momentum,
    params: Sequence[Tensor],
    *,
    beta1: float,
    alpha: float,
    l2: float,
) -> None:
    """As `StepKernels.write_momentum`."""
    layout = part.layout
    source, targets = _Source(grads, momentum, params, (beta1, alpha, l2)), addresses(out)
    launch(
        momentum_blocks.write_momentum_blocks,
        layout.blocks,
        layout.block_size,
        *source.arguments(),
        *_tables(layout),
        targets.ctypes.data,
        *_sizes(layout),
        4 * layout.numel >= STREAM_BYTES,
    )


def decode_update(
    part: Part,
    params: Sequence[Tensor],
    masters: Sequence[Tensor | None],
    variances: Sequence[Tensor],
    momentum: Tensor,
    scalars: Tensor,
    *,
    eps: float,
    proceed: Tensor | None = None,
) -> None:
    """As `StepKernels.decode_update`."""
    if proceed is not None and not proceed:
        return
    layout = part.layout
    bases, codes, fp32, spread = addresses(params), _codes(params), addresses(masters), addresses(variances)
    least = np.array([eps], np.float32)
    launch(
        momentum_blocks.decode_update_blocks,
        layout.blocks,
        layout.block_size,
        address(part.gathered),
        bases.ctypes.data,
        codes.ctypes.data,
        fp32.ctypes.data,
        spread.ctypes.data,
        address(scalars),
        least.ctypes.data,
        *_tables(layout),
        address(part.mask),
        *_sizes(layout),
    )
    momentum.copy_(part.gathered)


def undo_encode(
    part: Part,
    grads: Sequence[Tensor | None],
    momentum: Momentum,
    params: Sequence[Tensor],
    *,
    beta1: float,
    alpha: float,
    l2: float,
    proceed: Tensor | None = None,
) -> None:
    """As `StepKernels.undo_encode`."""
    if proceed is not None and proceed:
        return
    layout = part.layout
    source = _Source(grads, momentum, params, (beta1, alpha, l2))
    launch(
        momentum_blocks.undo_encode_blocks,
        layout.blocks,
        layout.block_size,
        *source.arguments(),
        *_tables(layout),
        address(part.residual),
        address(part.mask),
        address(part.sent),
        *_sizes(layout),
    )


def adam_scalars(
    steps: Tensor,
    variance_steps: Tensor,
    scalars: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    bias_correction: bool,
    proceed: Tensor | None = None,
) -> None:
    """As `StepKernels.adam_scalars`."""
    if proceed is not None and not proceed:
        return
    steps.add_(1.0)
    rate = float(lr)
    first, second = torch.ones(2, steps.numel(), dtype=torch.float64)
    if bias_correction:
        first = 1 - betas[0] ** steps.double()
        second = 1 - betas[1] ** variance_steps.double()
    scalars[:, 0] = rate / first
    scalars[:, 1] = 1 / second.sqrt()
    scalars[:, 2] = 1 - rate * weight_decay


class _Source:
    """Where a local momentum is computed from, as the loops take it; keeps the tables alive while they run."""

    def __init__(
        self,
        grads: Sequence[Tensor | None],
        momentum: Momentum,
        params: Sequence[Tensor],
        factors: tuple[float, float, float],
    ) -> None:
        payloads = momentum if isinstance(momentum, Tensor) else None
        self._payloads = address(payloads)
        self._tables = (addresses(grads), _codes(grads), addresses(params), _codes(params))
        self._momenta = None if isinstance(momentum, Tensor) else addresses(momentum)
        self._factors = np.array(factors, np.float32)

    def arguments(self) -> tuple[int, ...]:
        grads, grad_codes, params, param_codes = (table.ctypes.data for table in self._tables)
        momenta = 0 if self._momenta is None else self._momenta.ctypes.data
        return grads, grad_codes, momenta, params, param_codes, self._payloads, self._factors.ctypes.data


def _codes(tensors: Sequence[Tensor | None]) -> npt.NDArray[np.int64]:
    return np.array([0 if t is None else CODES[t.dtype] for t in tensors], np.int64)


def _tables(layout: Layout) -> tuple[int, int, int]:
    return layout.tensor_of_block.ctypes.data, layout.offset_of_block.ctypes.data, layout.count_of_block.ctypes.data


def _sizes(layout: Layout) -> tuple[int, int, int, int]:
    return layout.chunk_blocks, layout.bits_bytes, layout.payload_bytes, layout.block_size
