"""What scatters the mean of a unit's gradients compressed, in the place of FSDP's reduce-scatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from onebit.comm.backend import Backend
from onebit.comm.fsdp_hooks import UnitHook
from onebit.comm.fsdp_units import Unit
from onebit.comm.scatter import CompressedReduceScatter
from onebit.comm.stats import Stats
from onebit.compress.codec import Codec
from onebit.compress.errors import InputError
from onebit.compress.layout import ceil_div


class ScatterHook(UnitHook):
    """Takes the flat gradient of a whole unit and gives this rank the mean of its shard.

    The part of a parameter that goes to one rank is a tensor of its own in the average. All ranks' parts take as many
    blocks, and all of them are one bucket, so the chunk that the average has for a rank is what FSDP has for it. Zeros
    that fill a part up take no part.

    Args:
        unit: whose gradients.
        backend: the ranks of its shard mesh.
        codec: what goes on the wire; it has blocks.
    """

    def __init__(self, unit: Unit, backend: Backend, codec: Codec) -> None:
        super().__init__(unit)
        self._backend = backend
        self._codec = codec
        self._reduce: CompressedReduceScatter | None = None

    def install(self) -> None:
        self.unit.module.set_custom_reduce_scatter(self)  # type: ignore[arg-type]

    def remove(self) -> None:
        self.unit.module.set_custom_reduce_scatter(_Plain())  # type: ignore[arg-type]

    @property
    def stats(self) -> Stats:
        return Stats.total([] if self._reduce is None else [self._reduce.stats])

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for FSDP's flat tensors."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """FSDP's reduce-scatter.

        Args:
            output_tensor: (unit.numel,), overwritten by this rank's shard of what `op` makes of all ranks' inputs.
            input_tensor: (ranks · unit.numel,), the shards of all ranks one after the other.
            group: the ranks of the shard mesh.
            op: the mean, or the sum, which is the mean times the number of ranks.

        Raises:
            InputError: another operation, an asynchronous one, or not all trainable parameters have a gradient.
            TransportError: a peer is dead or too slow.
        """
        rank, size = self._backend.rank, self._backend.size
        self.unit.check(rank, output_tensor)
        if async_op or op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            what = "an asynchronous reduce-scatter" if async_op else f"a reduce-scatter by {op}"
            raise InputError(
                f"rank {rank}: module {self.unit.name!r}: FSDP asks for {what}, compressed there are the mean and the "
                "sum, complete on return; leave set_gradient_divide_factor out and scale the loss instead"
            )
        flat = input_tensor.view(size, -1)
        parts = [flat[r, p.start : p.start + p.room] for r in range(size) for p in self.unit.pieces]
        if self._reduce is None:
            self._reduce = self._make(parts)
        output_tensor.copy_(self._reduce(parts))
        if op == dist.ReduceOp.SUM:
            output_tensor.mul_(size)
        self.calls += 1

    def _make(self, parts: Sequence[Tensor]) -> CompressedReduceScatter:
        block_size = self._codec.block_size
        assert block_size is not None
        whole = sum(ceil_div(part.numel(), block_size) * block_size for part in parts)
        reduce = CompressedReduceScatter(
            parts, self._backend, self._codec, bucket_mb=4 * whole / 2**20 + 1, residual=self.residual
        )
        pieces = self.unit.pieces
        if any(real < piece.room for piece in pieces for real in piece.real):
            filled = [torch.arange(p.room) >= p.real[r] for r in range(self._backend.size) for p in pieces]
            reduce.set_mask([mask.to(parts[0].device) for mask in filled])
        return reduce


class _Plain:
    """What FSDP does by itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its older name
        work: dist.Work | None = scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        return work
