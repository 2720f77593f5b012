"""A codec that stands outside of the package, the one of docs/extending.md, averages and trains as those inside do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, BackendError, CompressedAllreduce, compressed_allreduce, run_threads
from onebit.compress import BlockFormat, BlockOperators, Codec, InputError
from onebit.optim import OnebitAdam
from tests.comm.launcher import run_ranks
from tests.comm.samples import Trace, bits, normal, state_bits, trace
from tests.docs.blocks import ROOT, blocks_of

NUMELS = (1000, 1, 0, 257)


def codec_of_the_page() -> Codec:
    """The class that the first block of the page makes, with small blocks."""
    block = next(block for block in blocks_of(ROOT / "docs" / "extending.md") if block.language == "python")
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block.text, block.place, "exec", dont_inherit=True), names)
    codec: Codec = names["TopKCodec"](block_size=64)
    return codec


def inputs(rank: int, call: int) -> list[Tensor]:
    return [normal(rank, call, i, numel=n) for i, n in enumerate(NUMELS)]


def traced(backend: Backend) -> Trace:
    return trace(backend, codec_of_the_page(), 3, 2.0**-10, inputs)


def largest(c: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What blocks of 64 say: their two largest."""
    blocks = np.pad(c, (0, -len(c) % 64)).reshape(-1, 64)
    kept = np.argsort(-np.abs(blocks), axis=1)[:, :2]
    said = np.zeros_like(blocks)
    np.put_along_axis(said, kept, np.take_along_axis(blocks, kept, 1), 1)
    flat: np.ndarray[Any, np.dtype[np.float64]] = said.reshape(-1)[: len(c)]
    return flat


def test_an_average_is_the_largest_of_the_mean_of_the_largest_with_feedback_on_both_sides() -> None:
    per_rank = run_threads(2, traced)
    for i, n in enumerate(NUMELS):
        worker, server = [np.zeros(n)] * 2, np.zeros(n)
        for call in range(3):
            sums = [inputs(rank, call)[i].double().numpy() + worker[rank] for rank in range(2)]
            said = [largest(c) for c in sums]
            worker = [c - s for c, s in zip(sums, said, strict=True)]
            whole = sum(said, np.zeros(n)) / 2 + server
            mean = largest(whole)
            server = whole - mean
            for seen in per_rank:
                # A few sums of numbers below 20, in fp32.
                np.testing.assert_allclose(seen.outputs[call][i].double().numpy(), mean, rtol=0, atol=20 * 2.0**-20)


def test_processes_send_the_same_bytes_as_threads() -> None:
    for seen, expected in zip(run_ranks("gloo", 2, traced), run_threads(2, traced), strict=True):
        assert seen.sent == expected.sent
        assert list(map(bits, seen.outputs)) == list(map(bits, expected.outputs))
        assert state_bits(seen.states) == state_bits(expected.states)


def test_a_number_that_is_not_finite_is_seen_and_undone() -> None:
    def undone(backend: Backend) -> tuple[bool, bool]:
        x = torch.ones(200)
        reduce = CompressedAllreduce(x, backend, codec_of_the_page())
        reduce(x.clone())
        before = reduce.residual.worker[0].clone()
        x[3] = torch.nan if backend.rank else 1.0
        work = reduce.start(x)
        work.finish()
        finite = bool(work.all_finite())
        work.undo()
        return finite, torch.allclose(reduce.residual.worker[0], before, atol=1e-5)

    assert run_threads(2, undone) == [(False, True)] * 2


def test_an_optimizer_trains_with_it() -> None:
    def train(backend: Backend) -> tuple[float, str, list[bytes]]:
        x = torch.nn.Parameter(torch.full((300,), 3.0))
        target = torch.linspace(-1, 1, 300)
        optimizer = OnebitAdam(
            [x], lr=0.05, weight_decay=0.0, freeze_step=20, backend=backend, codec=codec_of_the_page()
        )
        for _ in range(400):
            x.grad = (x.detach() - target) * (1.5 - backend.rank)
            optimizer.step()
        return float((x.detach() - target).square().mean()), optimizer.kernels, bits(x)

    one, other = run_threads(2, train)
    assert one == other
    assert one[1] == "torch"
    assert one[0] < 2.5  # from 9.3, of which two elements of 64 are told at a time


class Written(BlockFormat):
    """Writes what a test gave it."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.written = codes, scales

    def encode(self, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.written

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        raise AssertionError("nothing wrong is decoded")


@dataclass(frozen=True, kw_only=True)
class WrittenCodec(Codec):
    """Of one bit per element."""

    bits: ClassVar[int] = 1
    written: Written

    def kernels_on(self, device: torch.device | str) -> str:
        return "torch"

    def unchecked(self, device: torch.device) -> BlockOperators:
        return BlockOperators(self.written)


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (torch.zeros(3, 7, dtype=torch.uint8), torch.ones(3)),
        (torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2)),
        (torch.zeros(3, 8), torch.ones(3)),
        (torch.zeros(3, 8, dtype=torch.uint8), torch.ones(3, 1)),
    ],
    ids=["bytes of a block", "blocks", "dtype", "scales"],
)
def test_a_format_that_writes_what_does_not_fit_is_named_and_leaves_the_residual(codes: Tensor, scales: Tensor) -> None:
    codec, residual = WrittenCodec(block_size=64, written=Written(codes, scales)), torch.ones(192)
    with pytest.raises(InputError, match=r"Written\.encode must return codes, uint8 \(3, 8\), and scales, \(3,\); got"):
        codec.encode(torch.ones(192), residual)
    assert torch.equal(residual, torch.ones(192))


class Nameless(Backend):
    """A world of one rank, to be given a name and a device type by subclasses or objects; they may be anything."""

    def _all_to_all(self, output: Tensor, input: Tensor) -> None:
        output.copy_(input)

    _all_gather = _all_to_all

    def _all_reduce(self, tensor: Tensor) -> None:
        pass

    def _barrier(self) -> None:
        pass


class Named(Nameless):
    name = "named"


class Whole(Named):
    device_type = None


class Inheriting(Whole):
    pass


class Given(Nameless):
    """Has both in the object, as a transport of several kinds of groups does."""

    def __init__(self) -> None:
        self.name, self.device_type = "given", "cpu"
        super().__init__(rank=0, size=1)


class Computed(Nameless):
    """Has what is worked out when it is asked for, of what the object knows later."""

    device_type = "cpu"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"computed {self.rank}"


@pytest.mark.parametrize(
    ("kind", "lacking"), [(Nameless, "no name and no device_type"), (Named, "no device_type")], ids=["both", "one"]
)
def test_a_transport_that_lacks_what_it_must_say_of_itself_is_told_when_it_is_made(kind: Any, lacking: str) -> None:
    with pytest.raises(BackendError, match=rf"^{kind.__name__} has {lacking}, and a Backend needs a name, .* set them"):
        kind(rank=0, size=1)


@pytest.mark.parametrize(
    "make", [lambda: Whole(rank=0, size=1), lambda: Inheriting(rank=0, size=1), Given, lambda: Computed(rank=0, size=1)]
)
def test_it_may_inherit_them_or_have_them_in_the_object(make: Any) -> None:
    averaged = compressed_allreduce(torch.ones(3), backend=make())
    assert isinstance(averaged, Tensor)
    assert averaged.tolist() == [1, 1, 1]
