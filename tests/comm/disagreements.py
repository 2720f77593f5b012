"""What ranks may disagree about, and what each of them must then be told; the last rank is the odd one out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebit.comm import (
    Backend,
    CompressedAllreduce,
    DenseAllreduce,
    OnebitError,
    Residual,
    broadcast,
    compressed_allreduce,
)
from onebit.comm.torch_backend import TorchBackend
from onebit.compress import SignCodec
from tests.comm.samples import bits, residual_bits

AVERAGES = ("compressed_allreduce", "CompressedAllreduce", "DenseAllreduce")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One disagreement.

    Attributes:
        tensors: what a rank brings, told whether it is the odd one.
        fact: pattern of what the message must name as the first difference; None: there is none.
        usual, odd: patterns of what is said of the usual ranks and of the odd one.
        refused: pattern of why the odd rank, or with `fact` None every rank, refuses its own tensors; None: none does.
        options: what else a rank passes to the two averages, told whether it is the odd one.
        kinds: names of the transports that can tell.
        operations: names of the calls for which this is a difference, or is refused; those of `OPERATIONS`.
    """

    tensors: Callable[[bool], list[Tensor]] = lambda odd: [torch.ones(5), torch.ones(2, 3)]
    fact: str | None
    usual: str = ""
    odd: str = ""
    refused: str | None = None
    options: Callable[[bool], dict[str, Any]] = lambda odd: {}
    kinds: tuple[str, ...] = ("threads", "gloo", "mpi")
    operations: tuple[str, ...] = (*AVERAGES, "broadcast")


def _refused(kind: str, shape: str) -> str:
    return f"tensor 0 must be dense float32, bfloat16 or float16, got {kind} {shape}.*; convert it first"


CASES = {
    "sizes": Case(
        tensors=lambda odd: [torch.ones(5), torch.ones(7 + odd)],
        fact="tensor 1",
        usual=r"float32 \(7,\)",
        odd=r"float32 \(8,\)",
    ),
    "shapes of one size": Case(
        tensors=lambda odd: [torch.ones((3, 2) if odd else (2, 3))],
        fact="tensor 0",
        usual=r"float32 \(2, 3\)",
        odd=r"float32 \(3, 2\)",
    ),
    "dtypes": Case(
        tensors=lambda odd: [torch.ones(5, dtype=torch.bfloat16 if odd else torch.float32)],
        fact="tensor 0",
        usual=r"float32 \(5,\)",
        odd=r"bfloat16 \(5,\)",
    ),
    "number of tensors": Case(
        tensors=lambda odd: [torch.ones(5)] * (3 if odd else 2),
        fact="the number of tensors",
        usual="2",
        odd="3",
    ),
    "two tensors, of which the first is told": Case(
        tensors=lambda odd: [torch.ones(1), torch.ones(2 + odd), torch.ones(3 + odd)],
        fact="tensor 1",
        usual=r"float32 \(2,\)",
        odd=r"float32 \(3,\)",
    ),
    "block size of the codec": Case(
        options=lambda odd: {"codec": SignCodec(block_size=64 if odd else 1024)},
        fact="codec",
        usual=r"SignCodec\(block_size=1024,.*?\)",
        odd=r"SignCodec\(block_size=64,.*?\)",
    ),
    "scale of the codec": Case(
        options=lambda odd: {"codec": SignCodec(scale="rms" if odd else "mean")},
        fact="codec",
        usual=r"SignCodec\(.*?scale='mean'.*?\)",
        odd=r"SignCodec\(.*?scale='rms'.*?\)",
    ),
    "bucket size": Case(
        options=lambda odd: {"bucket_mb": 2.0 if odd else 1.0}, fact="bucket_mb", usual=r"1\.0", odd=r"2\.0"
    ),
    "integers on one rank": Case(
        tensors=lambda odd: [torch.ones(5, dtype=torch.int64 if odd else torch.float32)],
        fact="their input",
        usual="accepted",
        odd="refused: .*",
        refused=_refused("int64", r"\(5,\)"),
        operations=AVERAGES,
    ),
    "integers on one rank, which a broadcast would carry": Case(
        tensors=lambda odd: [torch.ones(5, dtype=torch.int64 if odd else torch.float32)],
        fact="tensor 0",
        usual=r"float32 \(5,\)",
        odd=r"int64 \(5,\)",
        operations=("broadcast",),
    ),
    "a sparse tensor on one rank": Case(
        tensors=lambda odd: [torch.ones(5).to_sparse() if odd else torch.ones(5)],
        fact="their input",
        usual="accepted",
        odd="refused: .*",
        refused=_refused("float32", r"\(5,\) with layout torch.sparse_coo"),
        operations=AVERAGES,
    ),
    "a sparse tensor on one rank, to be broadcast": Case(
        tensors=lambda odd: [torch.ones(5).to_sparse() if odd else torch.ones(5)],
        fact="their input",
        usual="accepted",
        odd="refused: .*",
        refused="tensor 0 must be a dense tensor, got a torch.sparse_coo one; convert it first",
        operations=("broadcast",),
    ),
    "a tensor on another device on one rank": Case(
        tensors=lambda odd: [torch.ones(5, device="meta" if odd else "cpu")],
        fact="their input",
        usual="accepted",
        odd="refused: .*",
        refused="tensor 0 is on meta, but the '(gloo|mpi)' backend carries cpu( and cuda)? tensors; move it, or use",
        kinds=("gloo", "mpi"),
        operations=AVERAGES,
    ),
    "a tensor without values on one rank, to be broadcast": Case(
        tensors=lambda odd: [torch.ones(5), torch.ones(5, device="meta" if odd else "cpu")],
        fact="their input",
        usual="accepted",
        odd="refused: .*",
        refused="tensor 1 is on meta and has no values; give it some first",
        operations=("broadcast",),
    ),
    "an expanded tensor on one rank, to be broadcast": Case(
        tensors=lambda odd: [torch.ones(1 if odd else 3).expand(3)],
        fact="their input",
        usual="accepted",
        odd="refused: .*",
        refused=r"tensor 0 must have its elements in places of their own, got float32 \(3,\) with strides \(0,\)",
        operations=("broadcast",),
    ),
    "memory shared by two tensors on one rank, to be broadcast": Case(
        tensors=lambda odd: [base := torch.ones(5), base[2:] if odd else torch.ones(3)],
        fact="tensor 1",
        usual=r"float32 \(3,\)",
        odd=r"float32 \(3,\) with strides \(1,\) from byte 8 of tensor 0",
        operations=("broadcast",),
    ),
    "integers on all ranks": Case(
        tensors=lambda odd: [torch.ones(5, dtype=torch.int32)],
        fact=None,
        refused=_refused("int32", r"\(5,\)"),
        operations=AVERAGES,
    ),
    "doubles on all ranks": Case(
        tensors=lambda odd: [torch.ones(5).double()],
        fact=None,
        refused=_refused("float64", r"\(5,\)"),
        operations=AVERAGES,
    ),
    "booleans on all ranks": Case(
        tensors=lambda odd: [torch.ones(()).bool()],
        fact=None,
        refused=_refused("bool", r"\(\)"),
        operations=AVERAGES,
    ),
}

Operation = Callable[..., Any]


def _function(tensors: list[Tensor], backend: Backend, residual: Residual, codec: SignCodec | None = None) -> None:
    compressed_allreduce(tensors, residual, backend=backend, codec=codec)


def _compressed(tensors: list[Tensor], backend: Backend, residual: Residual, **options: Any) -> None:
    CompressedAllreduce(tensors, backend, residual=residual, **options)(tensors)


def _dense(tensors: list[Tensor], backend: Backend, residual: Residual, **options: Any) -> None:
    DenseAllreduce(tensors, backend, **options)(tensors)


def _broadcast(tensors: list[Tensor], backend: Backend, residual: Residual) -> None:
    broadcast(tensors, backend, source=backend.size - 1)


# What each can be told; a call with an option that it does not have is no case.
OPERATIONS: dict[str, tuple[Operation, set[str]]] = {
    "compressed_allreduce": (_function, {"codec"}),
    "CompressedAllreduce": (_compressed, {"codec", "bucket_mb"}),
    "DenseAllreduce": (_dense, {"bucket_mb"}),
    "broadcast": (_broadcast, set()),
}
SUBJECTS = {name: name for name in OPERATIONS} | {"compressed_allreduce": "CompressedAllreduce"}


def applies(case: Case, operation: str, kind: str) -> bool:
    told = operation in case.operations and kind in case.kinds
    return told and set(case.options(True)) <= OPERATIONS[operation][1]


@dataclass(frozen=True)
class Outcome:
    """What one rank was told, and what was left behind."""

    error: str
    message: str
    unchanged: bool
    moved: int


def observe(backend: Backend, name: str, operation: str) -> Outcome:
    """Make the call of a case on one rank."""
    case, odd = CASES[name], backend.rank == backend.size - 1
    tensors, residual = case.tensors(odd), Residual()
    return outcome_of(backend, OPERATIONS[operation][0], tensors, residual, case.options(odd))


def outcome_of(
    backend: Backend, call: Operation, tensors: list[Tensor], residual: Residual, options: dict[str, Any]
) -> Outcome:
    before = (_contents(tensors), residual_bits(residual))
    error: Exception | None = None
    with counted(backend) as moved:
        try:
            call(tensors, backend, residual, **options)
        except OnebitError as caught:
            error = caught
    unchanged = before == (_contents(tensors), residual_bits(residual))
    return Outcome(type(error).__name__, str(error), unchanged, len(moved))


@contextmanager
def counted(backend: Backend) -> Iterator[list[str]]:
    """Note each start of a collective that carries content; the comparison of ranks needs all_gather alone."""
    moved: list[str] = []
    for name in ("_all_to_all", "_all_reduce"):
        original = getattr(backend, name)
        setattr(backend, name, lambda *a, original=original, name=name: (moved.append(name), original(*a))[1])
    try:
        yield moved
    finally:
        for name in ("_all_to_all", "_all_reduce"):
            delattr(backend, name)


def observe_all(backend: Backend) -> dict[tuple[str, str], Outcome]:
    """Every case with every operation one after the other, and a call with which nothing is wrong after each."""
    seen = {}
    for name, case in CASES.items():
        for operation in OPERATIONS:
            if applies(case, operation, backend.name):
                seen[name, operation] = observe(backend, name, operation)
                _go_on(backend)
    return seen


def send_cpu_tensors_over_nccl(backend: Backend) -> dict[str, Outcome]:
    """Every average of CPU tensors, over what calls itself NCCL; without a GPU that is all one can try."""
    nccl = TorchBackend(device_type="cuda")
    tensors = [torch.ones(5)]
    seen = {name: outcome_of(nccl, OPERATIONS[name][0], tensors, Residual(), {}) for name in AVERAGES}
    _go_on(backend)
    return seen


def _go_on(backend: Backend) -> None:
    x = torch.full((3,), float(backend.rank))
    compressed_allreduce(x, backend=backend)
    assert bool((x == (backend.size - 1) / 2).all())


def _contents(tensors: list[Tensor]) -> list[Any]:
    plain = [t.to_dense() if t.layout != torch.strided else t for t in tensors]
    return [str(t.dtype) if t.is_meta else bits(t) for t in plain]
