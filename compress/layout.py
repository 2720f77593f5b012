"""Where the blocks of a list of tensors lie in payloads: pure arithmetic on sizes, no data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onebit.compress.errors import InputError

ALIGNMENT = 16  # bytes; both sections of a payload start on it
SHARED_SCALE_BLOCK = 1024  # elements that are packed together when all blocks of a tensor share one scale


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up, for a >= 0 and b > 0."""
    return -(-a // b)


def align(n_bytes: int) -> int:
    """Return `n_bytes` rounded up to the payload alignment."""
    return ceil_div(n_bytes, ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Segment:
    """A run of consecutive elements of one tensor that fills consecutive blocks.

    Attributes:
        tensor: index of the tensor in the list.
        offset: its first element here, in the tensor's row-major order.
        numel: number of elements; only the last block of a tensor is not filled.
        block: the first block it fills.
    """

    tensor: int
    offset: int
    numel: int
    block: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The blocks of one bucket, dealt to `chunks` payloads of equal size.

    Chunk k is the blocks ``[k·chunk_blocks, (k+1)·chunk_blocks)``; blocks that no segment fills are padding. A
    payload is ``[codes | fp32 scales]``, each section starting on 16 bytes.

    Attributes:
        block_size: elements per block.
        chunks: number of payloads, one per rank.
        chunk_blocks: blocks per payload.
        segments: which tensor elements fill which blocks.
        shared_scale: all blocks of a tensor (of its part in a chunk, on the server side) have one scale.
        bits: of an element's code.
    """

    block_size: int
    chunks: int
    chunk_blocks: int
    segments: tuple[Segment, ...]
    shared_scale: bool
    bits: int = 1

    @cached_property
    def blocks(self) -> int:
        """Number of blocks, padding included."""
        return self.chunks * self.chunk_blocks

    @cached_property
    def padded_numel(self) -> int:
        """Elements of a residual that covers every block, padding included."""
        return self.blocks * self.block_size

    @cached_property
    def chunk_numel(self) -> int:
        """Elements of a residual that covers one chunk, padding included."""
        return self.chunk_blocks * self.block_size

    @property
    def numel(self) -> int:
        """Number of real elements."""
        return sum(segment.numel for segment in self.segments)

    @property
    def block_bytes(self) -> int:
        """Bytes of the codes of a block."""
        return self.block_size * self.bits // 8

    @cached_property
    def bits_bytes(self) -> int:
        """Bytes of a payload before its scales."""
        return align(self.chunk_blocks * self.block_bytes)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of one payload."""
        return self.bits_bytes + align(4 * self.chunk_blocks)

    @cached_property
    def spare_bytes(self) -> tuple[slice, ...]:
        """The bytes of a payload that belong to neither section and only fill it up."""
        bits_end, scales_end = self.chunk_blocks * self.block_bytes, self.bits_bytes + 4 * self.chunk_blocks
        spare = (slice(bits_end, self.bits_bytes), slice(scales_end, self.payload_bytes))
        return tuple(s for s in spare if s.start < s.stop)

    @cached_property
    def cache(self) -> dict[object, Any]:
        """What kernels keep with a layout, such as its tables on a device."""
        return {}

    @cached_property
    def tensor_of_block(self) -> npt.NDArray[np.int32]:
        """(blocks,) int32: which tensor fills a block; 0 for padding."""
        return self._per_block(np.int32, ((s, s.tensor) for s in self.segments))

    @cached_property
    def count_of_block(self) -> npt.NDArray[np.int32]:
        """(blocks,) int32: number of real elements of a block."""
        counts = self._per_block(np.int32, ((s, self.block_size) for s in self.segments))
        for s in self.segments:
            if s.numel % self.block_size:
                counts[s.block + s.numel // self.block_size] = s.numel % self.block_size
        return counts

    @cached_property
    def offset_of_block(self) -> npt.NDArray[np.int64]:
        """(blocks,) int64: a block's first element in its tensor."""
        first = self._per_block(np.int64, ((s, s.offset - s.block * self.block_size) for s in self.segments))
        return first + np.arange(self.blocks, dtype=np.int64) * self.block_size * (self.count_of_block > 0)

    def of_used_tensors(self) -> tuple[Layout, tuple[int, ...]]:
        """Return this layout for a list of only the tensors that it uses, and the indices of those."""
        used = tuple(sorted({s.tensor for s in self.segments}))
        place = {tensor: index for index, tensor in enumerate(used)}
        segments = tuple(replace(s, tensor=place[s.tensor]) for s in self.segments)
        return replace(self, segments=segments), used

    def by_segment(self, chunk: int | None = None) -> Layout:
        """Return the layout, or that of one chunk alone, with every segment taken for a tensor of its own."""
        segments = self.segments if chunk is None else self.chunk_segments(chunk)
        alone = tuple(Segment(i, 0, s.numel, s.block) for i, s in enumerate(segments))
        return replace(self, segments=alone, chunks=self.chunks if chunk is None else 1)

    def residual_span(self, segment: Segment) -> slice:
        """The elements of a padded residual that belong to `segment`."""
        start = segment.block * self.block_size
        return slice(start, start + segment.numel)

    def chunk_segments(self, chunk: int) -> Iterator[Segment]:
        """Yield the parts of segments that lie in `chunk`, with blocks counted from the chunk's first."""
        low, high = chunk * self.chunk_blocks, (chunk + 1) * self.chunk_blocks
        for s in self.segments:
            start = max(s.block, low)
            end = min(s.block + ceil_div(s.numel, self.block_size), high)
            if start < end:
                skipped = (start - s.block) * self.block_size
                numel = min(s.numel, (end - s.block) * self.block_size) - skipped
                yield Segment(s.tensor, s.offset + skipped, numel, start - low)

    def scale_groups(self, chunk: int | None = None) -> Iterator[npt.NDArray[np.int64]]:
        """Yield, per tensor, the blocks that share one scale: of all, or of one chunk counted from its first."""
        segments: Iterable[Segment] = self.segments if chunk is None else self.chunk_segments(chunk)
        groups: dict[int, list[npt.NDArray[np.int64]]] = {}
        for s in segments:
            blocks = np.arange(s.block, s.block + ceil_div(s.numel, self.block_size), dtype=np.int64)
            groups.setdefault(s.tensor, []).append(blocks)
        for parts in groups.values():
            yield np.concatenate(parts)

    def _per_block(self, dtype: type, values: Iterable[tuple[Segment, int]]) -> npt.NDArray[Any]:
        table: npt.NDArray[Any] = np.zeros(self.blocks, dtype=dtype)
        for s, value in values:
            table[s.block : s.block + ceil_div(s.numel, self.block_size)] = value
        return table


def plan(
    numels: Sequence[int], block_size: int | None, chunks: int = 1, bucket_numel: int | None = None, bits: int = 1
) -> tuple[Layout, ...]:
    """Lay tensors of `numels` elements out in buckets of at most about `bucket_numel` elements.

    Each tensor starts on a block boundary, so neither its neighbours nor the bucket size change which elements share a
    scale. With `block_size=None` every tensor is split into `chunks` parts of its own, for the same reason. Codes have
    `bits` bits per element.

    Returns:
        At least one layout; tensors without elements are in none.
    """
    if chunks < 1:
        raise InputError(f"chunks must be at least 1, got {chunks}")
    if bucket_numel is not None and bucket_numel < 1:
        raise InputError(f"bucket_numel must be at least 1 or None, got {bucket_numel}")
    if any(n < 0 for n in numels):
        raise InputError(f"numbers of elements must not be negative, got {min(numels)}")
    if block_size is None:
        layouts = _plan_shared(numels, chunks, bucket_numel)
    else:
        layouts = _plan_blocks(numels, block_size, chunks, bucket_numel)
    return tuple(replace(layout, bits=bits) for layout in layouts)


def _plan_blocks(numels: Sequence[int], block_size: int, chunks: int, bucket_numel: int | None) -> tuple[Layout, ...]:
    total = sum(ceil_div(n, block_size) for n in numels)
    most = total if bucket_numel is None else max(bucket_numel // block_size, chunks)
    buckets = max(ceil_div(total, most), 1) if most else 1
    per_bucket = ceil_div(ceil_div(total, buckets), chunks) * chunks
    segments: list[list[Segment]] = [[] for _ in range(max(ceil_div(total, per_bucket), 1) if per_bucket else 1)]
    start = 0
    for tensor, numel in enumerate(numels):
        end = start + ceil_div(numel, block_size)
        for bucket in range(start // per_bucket, ceil_div(end, per_bucket)) if end > start else ():
            first = max(start, bucket * per_bucket)
            offset = (first - start) * block_size
            last = min(numel, ((bucket + 1) * per_bucket - start) * block_size)
            segments[bucket].append(Segment(tensor, offset, last - offset, first - bucket * per_bucket))
        start = end
    return tuple(_layout(s, block_size, chunks, _chunk_blocks(s, block_size, chunks), False) for s in segments)


def _chunk_blocks(segments: Sequence[Segment], block_size: int, chunks: int) -> int:
    if not segments:
        return 0
    last = segments[-1]
    return ceil_div(last.block + ceil_div(last.numel, block_size), chunks)


def _plan_shared(numels: Sequence[int], chunks: int, bucket_numel: int | None) -> tuple[Layout, ...]:
    buckets: list[list[tuple[int, int]]] = [[]]
    filled = 0
    for tensor, numel in enumerate(numels):
        if buckets[-1] and bucket_numel is not None and filled + numel > bucket_numel:
            buckets.append([])
            filled = 0
        if numel:
            buckets[-1].append((tensor, numel))
            filled += numel
    return tuple(_shared_layout(bucket, chunks) for bucket in buckets)


def _shared_layout(tensors: Sequence[tuple[int, int]], chunks: int) -> Layout:
    size = SHARED_SCALE_BLOCK
    bounds = [[k * ceil_div(numel, size) // chunks for k in range(chunks + 1)] for _, numel in tensors]
    chunk_blocks = max((sum(b[k + 1] - b[k] for b in bounds) for k in range(chunks)), default=0)
    segments = []
    for k in range(chunks):
        block = k * chunk_blocks
        for (tensor, numel), bound in zip(tensors, bounds, strict=True):
            offset, end = bound[k] * size, min(bound[k + 1] * size, numel)
            if end > offset:
                segments.append(Segment(tensor, offset, end - offset, block))
                block += bound[k + 1] - bound[k]
    return _layout(segments, size, chunks, chunk_blocks, True)


def _layout(segments: Sequence[Segment], block_size: int, chunks: int, chunk_blocks: int, shared: bool) -> Layout:
    return Layout(
        block_size=block_size,
        chunks=chunks,
        chunk_blocks=chunk_blocks,
        segments=tuple(segments),
        shared_scale=shared,
    )
