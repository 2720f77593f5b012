"""What 1-bit LAMB's compressed step finds out about tensors, on CUDA tensors, and the scalars of the update from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.comm.part import Part
from onebit.compress.gpu.module import launch
from onebit.optim.gpu.blocks import numels
from onebit.optim.gpu.operands import TYPES, bits, operand, sorted_blocks
from onebit.optim.lamb import Layers

BLOCK = (
    1024  # elements that are measured together, and that have a scale; the only block size that there are kernels for
)

_SOURCE = str(Path(__file__).parent / "lamb.cu")
_FAN = 256  # measures that one warp puts together


class Measures:
    """The measures of k tensors with elements, in buffers that keep their addresses, and what is made of them.

    `begin`, `measure` for every part, and `finish` make one step's. Where ``proceed``, 0-dim bool on the device, is
    false, none of them changes anything that lasts; None: it is true.

    Args:
        sizes: of the tensors, in elements.
        indices: where each tensor stands in `Layers`.
        device: of the tensors.
    """

    def __init__(self, sizes: Sequence[int], indices: Sequence[int], device: torch.device) -> None:
        blocks = -(-np.array(sizes, np.int64) // BLOCK)
        groups = -(-blocks // _FAN)
        firsts, first_groups = _starts(blocks), _starts(groups)
        number = np.arange(groups.sum()) - np.repeat(first_groups, groups)
        counts = np.minimum(np.repeat(blocks, groups) - number * _FAN, _FAN)
        self._device, self._k, self._n_groups = device, len(blocks), len(number)
        self._firsts = torch.from_numpy(firsts).to(device)
        self._groups = _spans(np.repeat(firsts, groups) + number * _FAN, counts, device)
        self._tensors = _spans(first_groups, groups, device)
        self._layers = torch.tensor(indices, dtype=torch.int64, device=device)
        self._rows = torch.zeros(self._k, 4, device=device)
        self._measures = torch.zeros(int(blocks.sum()), 4, device=device)
        self._sums = torch.zeros(self._n_groups, 4, device=device)

    def begin(
        self, steps: Tensor, variance_steps: Tensor, group: Mapping[str, Any], proceed: Tensor | None = None
    ) -> None:
        """Count a step of every tensor in `steps`, (k,) fp32; `variance_steps` counts those that v stands for."""
        factors = (*map(bits, group["betas"]), int(group["bias_correction"]), _address(proceed))
        counts = (steps.data_ptr(), variance_steps.data_ptr(), self._k, self._rows.data_ptr())
        launch(_SOURCE, "begin", self._device, self._k, *counts, *factors)

    def measure(
        self,
        part: Part,
        first: int,
        momentum: Sequence[Tensor] | Tensor,
        variances: Sequence[Tensor],
        fresh: Sequence[Tensor],
        values: Sequence[Tensor],
        group: Mapping[str, Any],
        proceed: Tensor | None = None,
    ) -> None:
        """Bring v′ up to date with ``part.gathered`` as m′, and measure the part's blocks.

        Lists have an entry per tensor of ``part.used``, row-major; these are neighbours among the k tensors.

        Args:
            first: number of the part's first tensor among the k.
            momentum: m, as for `onebit.optim.kernels.StepKernels.encode_momentum`.
            variances: v, fp32.
            fresh: v′, fp32, updated in place.
            values: x, fp32, bf16 or fp16, read where there is weight decay.
        """
        layout, device, decay = part.layout, self._device, group["weight_decay"]
        of_variances = operand("variances", variances, layout, device, fp32=True)
        of_fresh = operand("fresh variances", fresh, layout, device, fp32=True)
        operands, value_address, types = [of_variances, of_fresh], 0, np.zeros(len(part.used), np.int64)
        if decay:
            operands.append(operand("measured values", values, layout, device))
            value_address, types = operands[-1].address, operands[-1].types
        if isinstance(momentum, Tensor):
            old, packed = (0, momentum.data_ptr()), True
        else:
            old, packed = (operand("momenta", momentum, layout, device, fp32=True).address, 0), False
        beta1, beta2 = group["betas"]
        factors = (*map(bits, (beta1, beta2, (1 - beta2) / (1 - beta1) ** 2, group["eps"], decay)), _address(proceed))
        tables = (self._rows[first:].data_ptr(), self._firsts[first:].data_ptr(), self._measures.data_ptr())
        sizes = (layout.chunk_blocks, layout.bits_bytes, layout.payload_bytes)
        for one in sorted_blocks("measure", layout, device, operands, packed, lambda: types, part.mask):
            full = f"measure_full_decay_{TYPES[one.kind]}" if decay else "measure_full"
            for places, kernel in ((one.full, full), (one.others, "measure_any")):
                blocks = (places.address, places.n, numels(layout, device).data_ptr(), part.gathered.data_ptr())
                state = (*old, of_variances.address, of_fresh.address, value_address, one.kind, _address(part.mask))
                launch(_SOURCE, kernel, device, 32 * places.n, *blocks, *state, *tables, *factors, *sizes)

    def finish(self, layers: Layers, scalars: Tensor, group: Mapping[str, Any], proceed: Tensor | None = None) -> None:
        """Find each tensor's r and c̄, keep them in `layers`, and write the scalars of its update.

        Args:
            scalars: (k, 3) fp32, as for `onebit.optim.kernels.StepKernels.decode_update`.
        """
        measures, sums, rows = self._measures.data_ptr(), self._sums.data_ptr(), self._rows.data_ptr()
        launch(
            _SOURCE,
            "gather",
            self._device,
            32 * self._n_groups,
            measures,
            self._groups.data_ptr(),
            self._n_groups,
            sums,
        )
        vectors = (layers.coeff, layers.coeff_mean, layers.coeff_weight, layers.factor, scalars)
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.is_cuda:
            lr = lr.double()
            rate = (lr.data_ptr(), 0)
        else:
            rate = (0, bits(float(lr)))
        options = ("weight_decay", "factor_min", "factor_max", "factor_threshold")
        arguments = (
            *(sums, self._tensors.data_ptr(), self._k, rows, self._layers.data_ptr()),
            *(vector.data_ptr() for vector in vectors),
            *(*rate, *(bits(group[name]) for name in options), _address(proceed)),
        )
        launch(_SOURCE, "coefficients", self._device, 32 * self._k, *arguments)


def _starts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each of several neighbours begins."""
    return np.cumsum(counts) - counts


def _spans(firsts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """(n, 2) int64, as `Span` in lamb.cu."""
    return torch.from_numpy(np.stack([firsts, counts], axis=1)).to(device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
