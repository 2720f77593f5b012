"""Bytes that every rank can work out: what each of them sends, and what a collective must leave."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebit.comm.backend import Backend, Work

DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn),
)
FILL = 0xAB
Bytes = NDArray[np.uint8]


def bytes_of(rank: int, length: int, dtype: torch.dtype) -> Bytes:
    """What a rank sends: `length` elements of random bytes that every rank can work out."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    return np.random.default_rng([rank, length, itemsize]).integers(0, high, length * itemsize, dtype=np.uint8)


def as_tensor(data: Bytes, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(data.copy()).view(dtype)


def as_bytes(tensor: Tensor) -> Bytes:
    return np.frombuffer(tensor.view(torch.uint8).numpy().tobytes(), dtype=np.uint8)


def blank(length: int, dtype: torch.dtype) -> Tensor:
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return torch.full((length * itemsize,), FILL, dtype=torch.uint8).view(dtype)


def exchanged(backend: Backend, k: int, dtype: torch.dtype) -> Bytes:
    """What all_to_all of pieces of k elements must leave on this rank."""
    sent = [bytes_of(rank, backend.size * k, dtype).reshape(backend.size, -1) for rank in range(backend.size)]
    return np.concatenate([pieces[backend.rank] for pieces in sent])


def gathered(backend: Backend, k: int, dtype: torch.dtype) -> Bytes:
    """What all_gather of k elements must leave on every rank."""
    return np.concatenate([bytes_of(rank, k, dtype) for rank in range(backend.size)])


def start_all_to_all(backend: Backend, k: int, dtype: torch.dtype) -> tuple[Work, Tensor, Tensor]:
    sent = as_tensor(bytes_of(backend.rank, backend.size * k, dtype), dtype)
    received = blank(backend.size * k, dtype)
    return backend.all_to_all(received, sent), received, sent


def start_all_gather(backend: Backend, k: int, dtype: torch.dtype) -> tuple[Work, Tensor, Tensor]:
    sent = as_tensor(bytes_of(backend.rank, k, dtype), dtype)
    received = blank(backend.size * k, dtype)
    return backend.all_gather(received, sent), received, sent
