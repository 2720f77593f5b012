"""1-bit LAMB's update of CUDA tensors, each at a rate of its own, in the pass that measures what the next rate is."""

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
from onebit.optim.gpu.operands import address, bits, operand
from onebit.optim.gpu.updates import updates
from onebit.optim.lamb import Layers

BLOCK = 1024  # elements that are measured together, and that have a scale; there are kernels for no other size

_SOURCE = str(Path(__file__).parent / "lamb.cu")
_FAN = 256  # measures that one warp puts together


class LayerwiseUpdate:
    """The update of k tensors with elements and the measures that it takes, in buffers that keep their addresses.

    `begin`, `update` for every part, and `finish` make one step's. Where ``proceed``, 0-dim bool on the device, is
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
        self,
        steps: Tensor,
        variance_steps: Tensor,
        layers: Layers,
        group: Mapping[str, Any],
        proceed: Tensor | None = None,
    ) -> None:
        """Count a step of every tensor, keep its c̄ in `layers`, and find its rate from that and the r that is there.

        Args:
            steps: (k,) fp32, incremented.
            variance_steps: (k,) fp32, the steps that v stands for.
        """
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.is_cuda:
            lr = lr.double()
            rate = (lr.data_ptr(), 0)
        else:
            rate = (0, bits(float(lr)))
        vectors = (layers.coeff, layers.coeff_mean, layers.coeff_weight, layers.factor)
        counts = (steps.data_ptr(), variance_steps.data_ptr(), self._k, self._rows.data_ptr(), self._layers.data_ptr())
        factors = (*rate, *map(bits, group["betas"]), int(group["bias_correction"]), address(proceed))
        arguments = (*counts, *(vector.data_ptr() for vector in vectors), *factors)
        launch(_SOURCE, "begin", self._device, self._k, *arguments)

    def update(
        self,
        part: Part,
        first: int,
        params: Sequence[Tensor],
        masters: Sequence[Tensor | None],
        variances: Sequence[Tensor],
        fresh: Sequence[Tensor],
        momentum: Sequence[Tensor] | Tensor,
        payload: Tensor,
        group: Mapping[str, Any],
        proceed: Tensor | None = None,
    ) -> None:
        """Update parameters from ``part.gathered`` as m′ and bring v′ up to date; the part's blocks are measured.

        Lists have an entry per tensor of ``part.used``, row-major; these are neighbours among the k tensors.

        Args:
            first: number of the part's first tensor among the k.
            params: x, fp32, bf16 or fp16, overwritten.
            masters: fp32 copies to start from instead and to write to as well; None: there is none.
            variances: v, fp32.
            fresh: v′, fp32, updated in place.
            momentum: m, as for `onebit.optim.kernels.StepKernels.encode_momentum`.
            payload: uint8, becomes a copy of ``part.gathered``; it may be `momentum`.
        """
        layout, device = part.layout, self._device
        param = operand("params", params, layout, device)
        master = operand("masters", masters, layout, device, fp32=True)
        of_variances = operand("variances", variances, layout, device, fp32=True)
        of_fresh = operand("fresh variances", fresh, layout, device, fp32=True)
        packed = isinstance(momentum, Tensor)
        old = 0 if isinstance(momentum, Tensor) else operand("momenta", momentum, layout, device, fp32=True).address
        beta1, beta2 = group["betas"]
        numbers = (beta1, beta2, (1 - beta2) / (1 - beta1) ** 2, group["eps"], group["weight_decay"])
        tables = (self._rows.data_ptr() + 16 * first, self._firsts.data_ptr() + 8 * first, self._measures.data_ptr())
        sizes = (layout.chunk_blocks, layout.bits_bytes, layout.payload_bytes)
        launches = updates("layerwise", part, device, param, master, [of_variances, of_fresh], plain=packed)
        for kernel, places, of_type in launches:
            blocks = (places.address, places.n, numels(layout, device).data_ptr(), part.gathered.data_ptr())
            state = (old, payload.data_ptr(), param.address, of_type, master.address, of_variances.address)
            rest = (of_fresh.address, address(part.mask), *tables, *map(bits, numbers), address(proceed))
            launch(_SOURCE, kernel, device, 32 * places.n, *blocks, *state, *rest, *sizes)

    def finish(self, layers: Layers, group: Mapping[str, Any], proceed: Tensor | None = None) -> None:
        """Find the r of each tensor's next step, and keep it in `layers`."""
        sums, k = self._sums.data_ptr(), self._k
        gathered = (self._measures.data_ptr(), self._groups.data_ptr(), self._n_groups, sums)
        launch(_SOURCE, "gather", self._device, 32 * self._n_groups, *gathered)
        options = ("weight_decay", "factor_min", "factor_max", "factor_threshold")
        tables = (sums, self._tensors.data_ptr(), k, self._layers.data_ptr(), layers.factor.data_ptr())
        limits = (*(bits(group[name]) for name in options), address(proceed))
        launch(_SOURCE, "factors", self._device, 32 * k, *tables, *limits)


def _starts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each of several neighbours begins."""
    return np.cumsum(counts) - counts


def _spans(firsts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """(n, 2) int64, as `Span` in lamb.cu."""
    return torch.from_numpy(np.stack([firsts, counts], axis=1)).to(device)
