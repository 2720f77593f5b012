"""The transport of a world of one rank: copies, on whatever device the tensors are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from onebit.comm.backend import Backend


class SingleBackend(Backend):
    """World size 1: what is sent comes back, and nothing is counted as sent. Any device; complete on return."""

    name = "single"
    device_type = None

    def __init__(self, timeout: float | None = None) -> None:
        super().__init__(rank=0, size=1, timeout=timeout)

    def _all_to_all(self, output: Tensor, input: Tensor) -> None:
        output.copy_(input)

    def _all_gather(self, output: Tensor, input: Tensor) -> None:
        output.copy_(input)

    def _all_reduce(self, tensor: Tensor) -> None:
        pass

    def _barrier(self) -> None:
        pass

    def _part(self, members: Sequence[int]) -> SingleBackend:
        return SingleBackend(self.timeout)
