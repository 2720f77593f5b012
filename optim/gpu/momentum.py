"""The fused step of 1-bit Adam on CUDA tensors: `onebit.optim.kernels.StepKernels`, tensors in, addresses out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.comm.part import Part
from onebit.compress import SignCodec
from onebit.compress.gpu.module import launch
from onebit.compress.gpu.operators import in_two_visits
from onebit.optim.gpu.blocks import Group, Places, numels
from onebit.optim.gpu.operands import TYPES, Operand, address, bits, operand, sorted_blocks
from onebit.optim.gpu.updates import updates

name = "gpu"

_SOURCE = str(Path(__file__).parent / "momentum.cu")
_ONE_VISIT = 0
_ENCODED = "encoded"
_UNDO_THREADS = 1 << 18  # a few per multiprocessor; they loop, for nearly always there is nothing to undo


def supports(codec: SignCodec) -> bool:
    """As `StepKernels.supports`: all options of the codec."""
    return True


def encode_momentum(
    part: Part,
    grads: Sequence[Tensor | None],
    momentum: Sequence[Tensor] | Tensor,
    params: Sequence[Tensor],
    *,
    beta1: float,
    alpha: float,
    l2: float,
) -> None:
    """As `StepKernels.encode_momentum`."""
    local = _Local(part, part.mask, grads, momentum, params, (beta1, alpha, l2))
    part.layout.cache[_ENCODED] = local
    layout, device, out, squared = part.layout, part.sent.device, part.sent.data_ptr(), int(part.squared)
    for group in local.groups:
        for places, kernel in ((group.full, "encode_full"), (group.masked, "encode_masked")):
            if places.n:
                of_types = f"{kernel}_{'l2_' if l2 else ''}{TYPES[group.kind % 4]}"
                arguments = (*local.arguments(places, group), out, *_sizes(part), squared)
                launch(_SOURCE, of_types, device, 32 * places.n, *arguments)

    def visit(stage: int, sums: int) -> None:
        for group in local.groups:
            if group.rest.n:
                arguments = (*local.arguments(group.rest, group), out, sums, *_sizes(part), squared, stage)
                launch(_SOURCE, "encode_any", device, 32 * group.rest.n, *arguments)

    if layout.shared_scale:
        in_two_visits(visit, layout.blocks, part.sent, layout, part.squared, None)
    else:
        visit(_ONE_VISIT, 0)


def write_momentum(
    part: Part,
    out: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum: Sequence[Tensor] | Tensor,
    params: Sequence[Tensor],
    *,
    beta1: float,
    alpha: float,
    l2: float,
) -> None:
    """As `StepKernels.write_momentum`."""
    local = _Local(part, None, grads, momentum, params, (beta1, alpha, l2))
    device = part.gathered.device
    targets = operand("written", out, part.layout, device, fp32=True).address
    for group in local.groups:
        of_types = f"write_full_{'l2_' if l2 else ''}{TYPES[group.kind % 4]}"
        for places, kernel in ((group.full, of_types), (group.others, "write_any")):
            if places.n:
                arguments = (*local.arguments(places, group), targets, *_sizes(part))
                launch(_SOURCE, kernel, device, 32 * places.n, *arguments)


def undo_encode(
    part: Part,
    grads: Sequence[Tensor | None],
    momentum: Sequence[Tensor] | Tensor,
    params: Sequence[Tensor],
    *,
    beta1: float,
    alpha: float,
    l2: float,
    proceed: Tensor | None = None,
) -> None:
    """As `StepKernels.undo_encode`; if `encode_momentum` was called, it has told the device of the same arguments."""
    local: _Local | None = part.layout.cache.get(_ENCODED)
    if local is None:
        local = _Local(part, part.mask, grads, momentum, params, (beta1, alpha, l2))
    rest = (part.sent.data_ptr(), address(proceed), *_sizes(part))
    for group in local.groups:
        threads = min(32 * group.all.n, _UNDO_THREADS)
        launch(_SOURCE, "undo_any", part.sent.device, threads, *local.arguments(group.all, group), *rest)


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
    layout, device = part.layout, part.gathered.device
    param = operand("params", params, layout, device)
    master = operand("masters", masters, layout, device, fp32=True)
    variance = operand("variances", variances, layout, device, fp32=True)
    for kernel, places, of_type in updates("update", part, device, param, master, [variance]):
        arguments = (
            *(places.address, places.n, numels(layout, device).data_ptr()),
            *(part.gathered.data_ptr(), momentum.data_ptr(), param.address, of_type, master.address),
            *(variance.address, address(part.mask), scalars.data_ptr(), bits(eps), address(proceed)),
        )
        launch(_SOURCE, kernel, device, 32 * places.n, *arguments, *_sizes(part))


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
    if isinstance(lr, Tensor) and lr.is_cuda:
        lr = lr if lr.dtype in (torch.float32, torch.float64) else lr.float()
        rate = (lr.data_ptr(), int(lr.dtype == torch.float64), 0)
    else:
        rate = (0, 0, bits(float(lr)))
    factors = (*map(bits, (*betas, weight_decay)), int(bias_correction), address(proceed))
    arguments = (steps.data_ptr(), variance_steps.data_ptr(), steps.numel(), scalars.data_ptr(), *rate, *factors)
    if steps.numel():
        launch(_SOURCE, "adam_scalars", scalars.device, steps.numel(), *arguments)


class _Local:
    """Operands of β₁·m + α·(g + l2·p), and the blocks to make it for; it holds addresses alone, no tensor of a part."""

    def __init__(
        self,
        part: Part,
        mask: Tensor | None,
        grads: Sequence[Tensor | None],
        momentum: Sequence[Tensor] | Tensor,
        params: Sequence[Tensor],
        factors: tuple[float, float, float],
    ) -> None:
        layout, device = part.layout, part.gathered.device
        self._buffers = (address(part.residual), address(mask))
        grad = operand("grads", grads, layout, device)
        operands = [grad, operand("encoded params", params, layout, device)] if factors[2] else [grad]
        packed = isinstance(momentum, Tensor)
        if isinstance(momentum, Tensor):
            self._momentum = (0, momentum.data_ptr())
        else:
            self._momentum = (operand("momenta", momentum, layout, device, fp32=True).address, 0)
        self._tables = [o.address for o in operands] + [0] * (2 - len(operands))
        self._factors = tuple(map(bits, factors))
        self._numels = numels(layout, device).data_ptr()
        plain = packed and self._buffers[0] % 16 == 0
        self.groups = sorted_blocks("encode", layout, device, operands, plain, lambda: _kinds(operands), mask)

    def arguments(self, places: Places, group: Group) -> tuple[int, ...]:
        """LOCAL_ARGUMENTS of momentum.cu."""
        grads, params = self._tables
        tensors = (grads, group.kind % 4, params, group.kind // 4, *self._momentum)
        return places.address, places.n, self._numels, *tensors, *self._buffers, *self._factors


def _kinds(operands: Sequence[Operand]) -> npt.NDArray[np.int64]:
    """The types of gradients, and 4 times those of the parameters where they are read."""
    return sum((4**i * o.types for i, o in enumerate(operands[1:], 1)), operands[0].types)


def _sizes(part: Part) -> tuple[int, int, int, int]:
    """SIZE_ARGUMENTS of momentum.cu."""
    layout = part.layout
    return layout.chunk_blocks, layout.bits_bytes, layout.payload_bytes, layout.block_size
