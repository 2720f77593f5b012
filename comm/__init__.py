"""Moves bytes between ranks: transports, and the compressed average written once over them."""

from onebit.comm.agreement import agree
from onebit.comm.allreduce import CompressedAllreduce, compressed_allreduce
from onebit.comm.backend import Backend, Traffic, Work
from onebit.comm.broadcast import broadcast
from onebit.comm.compressed_work import CompressedWork
from onebit.comm.dense import DenseAllreduce, DenseWork
from onebit.comm.errors import BackendError, MismatchError, TransportError
from onebit.comm.part import Part
from onebit.comm.registry import make_backend
from onebit.comm.residual import Residual
from onebit.comm.scatter import (
    AllGatherWork,
    CompressedAllGather,
    CompressedReduceScatter,
    ReduceScatterWork,
    compressed_all_gather,
    compressed_reduce_scatter,
)
from onebit.comm.stats import Stats
from onebit.comm.threads_backend import run_threads
from onebit.comm.tuning import Tuning, tune
from onebit.compress.errors import InputError, OnebitError

__all__ = [
    "AllGatherWork",
    "Backend",
    "BackendError",
    "CompressedAllGather",
    "CompressedAllreduce",
    "CompressedReduceScatter",
    "CompressedWork",
    "DenseAllreduce",
    "DenseWork",
    "InputError",
    "MismatchError",
    "OnebitError",
    "Part",
    "ReduceScatterWork",
    "Residual",
    "Stats",
    "Traffic",
    "TransportError",
    "Tuning",
    "Work",
    "agree",
    "broadcast",
    "compressed_all_gather",
    "compressed_allreduce",
    "compressed_reduce_scatter",
    "make_backend",
    "run_threads",
    "tune",
]
