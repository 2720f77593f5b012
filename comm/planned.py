"""What every compressed average is made of: a list of tensors, laid out in buckets once, and their error feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from onebit.comm.auto import BucketMode, Mode, check_mode, choose, mode_fact
from onebit.comm.backend import Backend
from onebit.comm.bucket import Bucket
from onebit.comm.bucket_size import bucket_mb_for
from onebit.comm.levels import LocalGroup, find_levels
from onebit.comm.plain import PlainBucket
from onebit.comm.residual import Place, Residual
from onebit.comm.shared_node import make_nodes
from onebit.comm.stats import Stats
from onebit.comm.tensors import Kind, Tensors, agree_on_tensors, as_list, resolve
from onebit.comm.two_level import TwoLevelBucket
from onebit.compress.codec import Codec, as_codec
from onebit.compress.errors import InputError
from onebit.compress.layout import Layout

Made = TypeVar("Made", bound="Planned")


class Planned:
    """The base of averages over a fixed list of tensors; collective to make.

    Args:
        like, backend, codec, mode, local_group, bucket_mb, residual: as for `onebit.comm.CompressedAllreduce`.

    Attributes:
        backend: the resolved Backend.
        codec: what goes on the wire.
        levels: the ranks of this node and those between nodes; None where all ranks are one level.
        local_transport: what numbers travel by inside a node, ``"shared memory"`` or the name of a backend; None where
            nothing is averaged on two levels.
        residual: the error feedback.
        modes: ``"compressed"`` or ``"plain"`` for each bucket, the same on every rank.
        stats: bytes and times so far.
    """

    _lasting = True  # made for many calls
    _writes: ClassVar[bool] = True  # a call writes its tensors

    def __init__(
        self,
        like: Tensors,
        backend: object,
        codec: Codec | None,
        *,
        mode: Mode = "compressed",
        local_group: LocalGroup = None,
        bucket_mb: float | None = None,
        residual: Residual | None = None,
    ) -> None:
        check_mode(mode)
        tensors = as_list(like)
        subject = type(self).__name__
        self.codec = as_codec(codec)
        self.backend: Backend = resolve(tensors, backend)
        if not isinstance(residual, (Residual, NoneType)):
            raise InputError(
                f"residual must be an onebit.comm.Residual or None, got {type(residual).__name__}; other arguments, "
                "such as codec= and backend=, are given by name"
            )
        self.residual = Residual() if residual is None else residual
        bucket_mb = bucket_mb_for(tensors, bucket_mb)
        refusal = _refusal(self.backend.rank, mode, self.codec)
        self.levels = find_levels(self.backend, local_group, subject, refusal)
        self._device = tensors[0].device if tensors else torch.device("cpu")
        layouts = self._plan(tensors, bucket_mb)
        place = self._place(tensors, layouts)
        options = {
            "codec": self.codec,
            "bucket_mb": bucket_mb,
            "mode": mode_fact(mode, self.backend, self._device, self.codec),
        }
        written = self._writes and not self._lasting  # then these are the tensors of the call, and not others like them
        agree_on_tensors(self.backend, subject, tensors, options, self.residual.refusal(place), written=written)
        self.stats = Stats()
        self._like = [Kind.of(t) for t in tensors]
        self._numel = sum(place.numels)
        self._operators = self.codec.unchecked(self._device)
        if self.levels is not None and not self.levels.compresses:
            mode = "plain"
        numels = [layout.numel for layout in layouts]
        self.modes: Sequence[BucketMode] = choose(mode, numels, self.backend, self._device, self.codec)
        self.residual.bind(place)
        self.local_transport: str | None = None
        self._buckets = self._make_buckets(layouts)
        self._masks: Sequence[Tensor] | None = None
        self._staging: dict[int, Tensor] = {}

    @classmethod
    def for_one_call(cls: type[Made], *arguments: Any, **named: Any) -> Made:
        """Make one as the constructor does, of the tensors of the only call: in memory that takes no preparation."""
        made = cls.__new__(cls)
        made._lasting = False
        cls.__init__(made, *arguments, **named)
        return made

    def set_mask(self, masks: Sequence[Tensor] | None) -> None:
        """Take elements out of the average from now on: they are sent as nothing, hold no residual and become 0.

        Args:
            masks: one bool tensor per tensor, True for an element that takes no part, the same on every rank; None: all
                take part.

        Raises:
            InputError: wrong number, dtype or size of masks.
        """
        if masks is not None and len(masks) != len(self._like):
            raise InputError(f"set_mask: expected {len(self._like)} masks, one per tensor, got {len(masks)}")
        self._masks = None if self._buckets else masks  # buckets keep theirs as bits
        for bucket in self._buckets:
            bucket.set_mask(masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the error feedback of this rank; every rank has its own to save."""
        return self.residual.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the error feedback of the same rank and world size; see `Residual.load_state_dict`."""
        self.residual.load_state_dict(state)

    def _plan(self, tensors: Sequence[Tensor], bucket_mb: float) -> Sequence[Layout]:
        """How these tensors are laid out in buckets, with a chunk for every rank; with one rank in none."""
        layouts: list[Layout] = []
        dtypes = sorted({t.dtype for t in tensors}, key=str) if self.backend.size > 1 else []
        for dtype in dtypes:  # a bucket holds one dtype; the other tensors count as empty
            numels = [t.numel() if t.dtype == dtype else 0 for t in tensors]
            layouts += plan_buckets(self.codec, numels, self.backend.size, bucket_mb)
        return layouts

    def _place(self, tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> Place:
        """Where error feedback is kept: on two levels that between nodes, of this rank's slice."""
        group, held = self.backend, layouts
        if self.levels is not None:
            group = self.levels.between
            held = [self.levels.slice_of(layout) for layout in layouts] if self.levels.compresses else []
        return Place(
            numels=tuple(t.numel() for t in tensors),
            layouts=tuple(held),
            rank=group.rank,
            world_size=group.size,
            device=self._device,
            feedback=self.codec.error_feedback,
        )

    def _make_buckets(self, layouts: Sequence[Layout]) -> list[Bucket]:
        """One bucket per layout, on the residuals of the place."""
        operators, device = self._operators, self._device
        if self.levels is not None and not self.levels.compresses:
            return [PlainBucket(operators, layout, self.backend, None, None, device) for layout in layouts]
        residuals = self.residual.per_bucket()
        if self.levels is not None:
            nodes = make_nodes([layout.of_used_tensors()[0] for layout in layouts], self.levels, device)
            self.local_transport = nodes[0].transport if nodes else None
            parts = zip(layouts, nodes, residuals, strict=True)
            return [
                TwoLevelBucket(operators, layout, self.levels, node, worker, server, device)
                for layout, node, (worker, server) in parts
            ]
        compressed = partial(Bucket, lasting=self._lasting)
        kinds = [PlainBucket if mode == "plain" else compressed for mode in self.modes]
        flat = zip(kinds, layouts, residuals, strict=True)
        return [
            kind(operators, layout, self.backend, worker, server, device) for kind, layout, (worker, server) in flat
        ]

    def _rows(self, tensors: Sequence[Tensor], copy: bool) -> list[Tensor]:
        """The tensors in row-major order: themselves, or for other strides a buffer, filled if `copy`."""
        rows = []
        for index, t in enumerate(tensors):
            if not t.is_contiguous():
                if index not in self._staging:
                    self._staging[index] = torch.empty_like(t, memory_format=torch.contiguous_format)
                t = self._staging[index].copy_(t) if copy else self._staging[index]
            rows.append(t)
        return rows

    def _taking_part(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors with 0 for what is masked, where there are no buckets to see to it."""
        if self._masks is None:
            return tensors
        return [t.masked_fill(mask, 0.0) for t, mask in zip(tensors, self._masks, strict=True)]


def plan_buckets(codec: Codec, numels: Sequence[int], ranks: int, bucket_mb: float) -> list[Layout]:
    """The buckets of tensors of one dtype with so many elements, with a chunk for every rank; none that is empty."""
    planned = codec.plan(list(numels), ranks, max(int(bucket_mb * 2**20) // 4, 1))
    return [layout for layout in planned if layout.blocks]


def _refusal(rank: int, mode: Mode, codec: Codec) -> InputError | None:
    """Why these options do not go with two levels."""
    if mode != "compressed":
        return InputError(
            f"rank {rank}: local_group= is for mode='compressed', got mode={mode!r}; transports have levels of their "
            "own for plain averages: leave local_group out"
        )
    if codec.block_size is None:
        return InputError(
            f"rank {rank}: local_group= needs a codec with blocks, for every rank of a node encodes its slice of a "
            f"tensor alone; got {codec}; give it a block_size"
        )
    return None
