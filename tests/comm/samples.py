"""Lists of tensors that an average must survive, what one rank sees of its averages, and views of it bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, DenseAllreduce, Residual, broadcast
from onebit.compress import Codec, SignCodec
from tests.comm import oracle

CODECS = {
    "1024 mean": SignCodec(),
    "64 mean": SignCodec(block_size=64),
    "one rms scale": SignCodec(block_size=None, scale="rms"),
}

# Shape, dtype and strides: nothing, one number, primes, one more and one less than a block, and every kind of strides.
SPECS: tuple[tuple[tuple[int, ...], torch.dtype, str], ...] = (
    ((), torch.float32, "rows"),
    ((0,), torch.float32, "rows"),
    ((1,), torch.float32, "rows"),
    ((1031,), torch.float32, "rows"),
    ((2, 3, 5, 7), torch.float32, "channels_last"),
    ((64, 17), torch.bfloat16, "rows"),
    ((0, 3), torch.float16, "rows"),
    ((33, 31), torch.float32, "transposed"),
    ((65,), torch.float16, "rows"),
    ((), torch.bfloat16, "rows"),
    ((127,), torch.float32, "every other"),
    ((2, 4, 3, 3), torch.float16, "channels_last"),
    ((1,), torch.float16, "every other"),
    ((63,), torch.float32, "unaligned"),
)
NUMELS = [int(np.prod(shape)) for shape, _, _ in SPECS]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


SMALL_BUCKET = 2.0**-9  # MiB: 512 elements, so that the samples fill several buckets


def sample(index: int, rank: int, call: int) -> Tensor:
    """What a rank holds of tensor `index` at one call; each tensor has a magnitude of its own."""
    shape, dtype, strides = SPECS[index]
    values = np.random.default_rng([2102, index, rank, call]).standard_normal(shape) * 10.0 ** (index % 5 - 2)
    return strided(torch.as_tensor(values).to(dtype), strides)


def strided(rows: Tensor, strides: str) -> Tensor:
    """The same values in a tensor with other strides."""
    if strides == "channels_last":
        return rows.to(memory_format=torch.channels_last)
    if strides == "transposed":
        return rows.t().contiguous().t()
    if strides == "every other":
        return torch.stack([rows, torch.full_like(rows, torch.nan)], -1)[..., 0]
    if strides == "unaligned":
        return torch.cat([rows.new_zeros(1), rows])[1:]
    return rows


def samples(rank: int, call: int) -> list[Tensor]:
    """What a rank passes to one call."""
    return [sample(index, rank, call) for index in range(len(SPECS))]


def normal(*seed: int, numel: int = 3000) -> Tensor:
    """(numel,) fp32 with a normal distribution."""
    return torch.as_tensor(np.random.default_rng([909, *seed]).standard_normal(numel), dtype=torch.float32)


def arrays(tensors: Sequence[Tensor]) -> list[oracle.Floats]:
    """The same numbers, exactly, flat in float64."""
    return [t.detach().double().reshape(-1).cpu().numpy().copy() for t in tensors]


def bits(tensors: Tensor | Sequence[Tensor]) -> list[bytes]:
    """Every tensor's elements as bytes, in row-major order."""
    listed = [tensors] if isinstance(tensors, Tensor) else tensors
    rows = (t.detach().clone(memory_format=torch.contiguous_format).view(-1) for t in listed)
    return [row.view(torch.uint8).cpu().numpy().tobytes() for row in rows]


def state_bits(state: Any) -> Any:
    """A state_dict with every tensor as bytes, so that == compares bit for bit."""
    if isinstance(state, Tensor):
        return (str(state.dtype), tuple(state.shape), bits(state))
    if isinstance(state, Mapping):
        return {key: state_bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [state_bits(value) for value in state]
    return state


def worker_parts(state: Mapping[str, Any]) -> list[oracle.Floats]:
    """The worker residual of every tensor."""
    return arrays(torch.split(state["worker"], state["numels"]))


def server_parts(states: Sequence[Mapping[str, Any]]) -> list[oracle.Floats]:
    """The server residual of every tensor, put together from all ranks; every element is held by exactly one."""
    merged = [np.full(n, np.nan) for n in states[0]["numels"]]
    for state in states:
        values = arrays([state["server"]])[0]
        at = 0
        for tensor, offset, numel in state["server_spans"].tolist():
            assert np.isnan(merged[tensor][offset : offset + numel]).all(), "two ranks hold one element"
            merged[tensor][offset : offset + numel] = values[at : at + numel]
            at += numel
    assert not any(np.isnan(part).any() for part in merged), "nobody holds an element"
    return merged


@dataclass
class Trace:
    """What one rank saw: outputs and feedback after every call, and every buffer that it handed to the transport."""

    outputs: list[list[Tensor]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)


def trace(
    backend: Backend,
    codec: Codec,
    calls: int = 3,
    bucket_mb: float = 16.0,
    inputs: Callable[[int, int], list[Tensor]] = samples,
) -> Trace:
    """Average ``inputs(rank, call)`` a few times."""
    seen = Trace()
    reduce = CompressedAllreduce(inputs(backend.rank, 0), backend, codec, bucket_mb=bucket_mb)
    for call in range(calls):
        tensors = inputs(backend.rank, call)
        with recorded(backend) as sent:
            reduce(tensors)
        seen.outputs.append(tensors)
        seen.states.append(reduce.state_dict())
        seen.sent += sent
    return seen


def dense_trace(backend: Backend, bucket_mb: float = 16.0) -> Trace:
    """Average the samples in fp32 a few times, and then make them rank 1's."""
    seen = Trace()
    reduce = DenseAllreduce(samples(0, 0), backend, bucket_mb=bucket_mb)
    for call in range(2):
        tensors = samples(backend.rank, call)
        with recorded(backend) as sent:
            reduce(tensors)
        seen.outputs.append(tensors)
        seen.sent += sent
    tensors = samples(backend.rank, 2)
    broadcast(tensors, backend, source=backend.size - 1)
    seen.outputs.append(tensors)
    return seen


def traces(backend: Backend) -> dict[str, Trace]:
    """One rank's traces with every codec, with many buckets, and without compression."""
    seen = {name: trace(backend, codec) for name, codec in CODECS.items()}
    seen["small buckets"] = trace(backend, CODECS["64 mean"], bucket_mb=SMALL_BUCKET)
    seen["dense"] = dense_trace(backend)
    seen["dense, small buckets"] = dense_trace(backend, SMALL_BUCKET)
    return seen


@contextmanager
def recorded(backend: Backend) -> Iterator[list[bytes]]:
    """Note the bytes of every buffer that is handed to the transport."""
    sent: list[bytes] = []

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def note(output: Tensor, input: Tensor) -> Any:
            sent.extend(bits(input))
            return original(output, input)

        return note

    names = ("_all_to_all", "_all_gather")
    for name in names:
        setattr(backend, name, noting(getattr(backend, name)))
    try:
        yield sent
    finally:
        for name in names:
            delattr(backend, name)


def residual_bits(residual: Residual) -> Any:
    return state_bits(residual.state_dict())
