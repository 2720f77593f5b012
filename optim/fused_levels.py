"""The fused step on two levels: what a rank makes is its share of its node's mean, and that is what is encoded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from onebit.comm import CompressedAllreduce, Part
from onebit.comm.two_level import TwoLevelPart
from onebit.optim.kernels import Momentum, StepKernels


class NodeKernels:
    """`StepKernels` for the parts of an average on two levels, by those for one level.

    A local momentum is written where the ranks of the node take its mean from, which the average then encodes. What
    comes back is as on one level, and so is the update.

    Args:
        kernels: of the device.
    """

    def __init__(self, kernels: StepKernels) -> None:
        self._kernels = kernels
        self.name = kernels.name
        self.supports = kernels.supports
        self.write_momentum = kernels.write_momentum
        self.decode_update = kernels.decode_update
        self.adam_scalars = kernels.adam_scalars

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
        """Write the local momentum for the node's mean; error feedback is that of the mean, and changes when it is."""

        def write(out: Sequence[Tensor]) -> None:
            self._kernels.write_momentum(part, out, grads, momentum, params, beta1=beta1, alpha=alpha, l2=l2)

        _of_node(part).fill(write)

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
        """As `StepKernels.undo_encode`, of the slice between nodes; what it was made from is not read."""
        between, node = _of_node(part).between, _of_node(part).node
        if between.encoded and between.part.layout.segments:  # else it is padding, or the mean has never come
            slices = node.mean_of(None)
            mean = [slices[i] for i in between.part.used]
            self._kernels.undo_encode(between.part, mean, mean, (), beta1=0.0, alpha=1.0, l2=0.0, proceed=proceed)
        between.encoded = False


def step_kernels_of(kernels: StepKernels, reduce: CompressedAllreduce) -> StepKernels:
    """These kernels, as the parts of an average need them."""
    return kernels if reduce.levels is None else NodeKernels(kernels)


def _of_node(part: Part) -> TwoLevelPart:
    assert isinstance(part, TwoLevelPart)
    return part
