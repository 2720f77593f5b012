"""The fused steps: encoding a local momentum, and updating parameters from an averaged one, each in one pass."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from onebit.comm import Part
from onebit.compress import Codec, SignCodec

IMPLEMENTATIONS = {"cpu": "onebit.optim.cpu.momentum", "gpu": "onebit.optim.gpu.momentum"}  # named as the codec's

Momentum = Sequence[Tensor] | Tensor
"""An averaged momentum: fp32 tensors, or the (chunks · payload_bytes,) uint8 payloads that they were decoded from."""


class StepKernels(Protocol):
    """One implementation of the fused step of 1-bit Adam; the caller has checked the arguments.

    `part` is a bucket of a `CompressedAllreduce` of fp32 momenta. Lists have an entry per tensor of ``part.used``:
    contiguous, fp32, bf16 or fp16, and each entry may have a dtype of its own. Arithmetic is fp32, every operation
    below rounded once, in the order written, so that implementations agree bit for bit.
    """

    name: str

    def supports(self, codec: SignCodec) -> bool:
        """Whether there are kernels for a codec's options."""

    def encode_momentum(
        self,
        part: Part,
        grads: Sequence[Tensor | None],
        momentum: Momentum,
        params: Sequence[Tensor],
        *,
        beta1: float,
        alpha: float,
        l2: float,
    ) -> None:
        """Encode β₁·m + α·(g + l2·p) + residual into ``part.sent`` and update ``part.residual``, as the codec would.

        The sum is ((β₁·m) + (α·g')) + residual with g' = g + (l2·p), or g' = g where l2 is 0 and `params` are not read.
        A gradient that is None counts as zeros. Both forms of `momentum` give the same bits: m is ± scale in payloads.
        """

    def write_momentum(
        self,
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
        """Write what `encode_momentum` adds the residual to; masks are not looked at.

        Args:
            out: for each chunk of ``part.layout`` its numbers in the order of its blocks, (chunk elements,) fp32 at an
                address that is a multiple of 64; what is in padding is anything afterwards.
        """

    def decode_update(
        self,
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
        """Update parameters from ``part.gathered``, and copy that to `momentum` (uint8, the same size, or itself).

        w is the master (fp32) or the parameter; w ← w·keep, then w ← w - (rate·m) / ((√v·root) + ε), then the master is
        w and the parameter is w rounded. Where the mask is set only the first acts.

        Args:
            scalars: (k, 3) fp32, a row per tensor of ``part.used``: rate, root, keep; as from `adam_scalars`.
            proceed: 0-dim bool on the device; where it is false nothing changes. None: true.
        """

    def undo_encode(
        self,
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
        """Put ``part.residual`` back to before `encode_momentum` with the same arguments, to within rounding.

        residual ← (residual + sent) - c, c the sum without the residual; blocks that sent NaN have kept theirs.
        Whoever has encoded the same numbers otherwise may undo it by β₁ = 0 and α = 1, with the numbers as `grads`.

        Args:
            proceed: 0-dim bool on the device; where it is true nothing changes. None: false.
        """

    def adam_scalars(
        self,
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
        """Count a step, and write what `decode_update` needs for it; computed in fp64, rounded to fp32 once.

        With t steps made, this one included, of which T updated the variance: rate = lr / (1 - β₁ᵗ),
        root = 1 / √(1 - β₂ᵀ), both without the factors if `bias_correction` is false; keep = 1 - lr·weight_decay.

        Args:
            steps: (k,) fp32, incremented.
            variance_steps: (k,) fp32.
            scalars: (k, 3) fp32, written.
            lr: a number, or a tensor of one element, which may be on the device.
            weight_decay: the decoupled one; 0 where decay is l2.
            proceed: 0-dim bool on the device; where it is false nothing changes. None: true.
        """


def step_kernels(device: torch.device, codec: Codec) -> StepKernels | None:
    """Return the fused kernels beside the codec's own for tensors on `device`; None: there are none, or not for it."""
    if not isinstance(codec, SignCodec):
        return None
    name = codec.kernels_on(device)
    if name not in IMPLEMENTATIONS:
        return None
    kernels = _load(name)
    return kernels if kernels.supports(codec) else None


@functools.cache
def _load(name: str) -> StepKernels:
    return cast(StepKernels, importlib.import_module(IMPLEMENTATIONS[name]))
