"""onebit.comm.ddp.compress_gradients: DDP's gradients averaged compressed, with feedback that belongs to parameters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from onebit.comm import Backend, CompressedAllreduce, InputError, Residual
from onebit.comm.ddp import CompressedHook, compress_gradients
from tests.comm.ddp_runs import Branching, Straight, backward, data, model
from tests.comm.launcher import run_ranks
from tests.comm.oracle import wire_bytes
from tests.comm.samples import bits, state_bits

STEPS = 6
SMALL = {"bucket_cap_mb": 0.01}
WRAPS: dict[str, dict[str, Any]] = {
    "one bucket": {},
    "many buckets": SMALL,
    "views": {**SMALL, "gradient_as_bucket_view": True},
    "static graph": {**SMALL, "static_graph": True},
}


class Rows(nn.Sequential):
    """Parameters that lie in memory row by row, as a list of gradients does."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 33), nn.Linear(33, 2))


@dataclass
class Seen:
    """One rank's run: this rank's own gradients and their means after each step, and the hook at the end of it."""

    own: list[list[Tensor]]
    means: list[list[Tensor]]
    states: list[dict[str, Any]]
    sent: int
    rebuilt: bool


def make(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(9)
    return kind().to(dtype)


def train(
    backend: Backend,
    wrap: Mapping[str, Any],
    kind: type[nn.Module] = Rows,
    dtype: torch.dtype = torch.float32,
    bucket_mb: float | None = None,
    resume_at: int | None = None,
) -> Seen:
    """SGD over the means; a twin that is not wrapped has the same parameters and this rank's own gradients."""
    inner, twin = make(kind, dtype), make(kind, dtype)
    called = DistributedDataParallel(inner, **wrap)
    hook = compress_gradients(called, bucket_mb=bucket_mb)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.05)
    seen = Seen([], [], [], 0, False)
    for number in range(STEPS):
        if number == resume_at:
            state = hook.state_dict()
            called = DistributedDataParallel(inner, **wrap)
            hook = compress_gradients(called, bucket_mb=bucket_mb)
            hook.load_state_dict(state)
        twin.load_state_dict(inner.state_dict())
        x = data(backend.rank, number).to(dtype)
        for trained in (twin, called):
            trained.zero_grad()
            if isinstance(inner, Branching) and isinstance(twin, Branching):
                inner.branch = twin.branch = (number + backend.rank) // 2 % 2
            trained(x).square().mean().backward()
        optimizer.step()
        seen.own.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in twin.parameters()])
        nothing = torch.nan  # where no rank has a gradient, DDP leaves none and drops what the hook has made of it
        seen.means.append(
            [torch.full_like(p, nothing) if p.grad is None else p.grad.clone() for p in inner.parameters()]
        )
        seen.states.append(hook.state_dict())
    seen.sent = hook.stats.wire_bytes
    seen.rebuilt = bool(called._get_ddp_logging_data().get("has_rebuilt_buckets"))
    return seen


def all_runs(backend: Backend) -> dict[str, Seen]:
    runs = {name: train(backend, wrap) for name, wrap in WRAPS.items()}
    runs["small buckets of the hook"] = train(backend, {}, bucket_mb=0.004)
    runs["many and small buckets"] = train(backend, SMALL, bucket_mb=0.004)
    runs["resumed"] = train(backend, SMALL, resume_at=3)
    runs["strides"] = train(backend, SMALL, Straight)
    runs["unused parameters"] = train(backend, {**SMALL, "find_unused_parameters": True}, Branching)
    runs["bf16"] = train(backend, SMALL, dtype=torch.bfloat16)
    return runs


@functools.cache
def seen(world_size: int) -> list[dict[str, Seen]]:
    return run_ranks("gloo", world_size, all_runs, timeout=120.0)


SAME = [*WRAPS, "small buckets of the hook", "many and small buckets", "resumed"]


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("world_size", [2, 3])
def test_means_have_the_bits_of_one_compressed_average_however_ddp_forms_its_buckets(
    world_size: int, name: str
) -> None:
    for rank, right in zip(seen(world_size), averages(world_size), strict=True):
        assert [bits(means) for means in rank[name].means] == right


@functools.cache
def averages(world_size: int) -> list[list[list[bytes]]]:
    """Every step's gradients of the first run, averaged as one list from the last parameter to the first."""
    own = [rank["one bucket"].own for rank in seen(world_size)]
    return run_ranks("gloo", world_size, average, own)


def average(backend: Backend, own: list[list[list[Tensor]]]) -> list[list[bytes]]:
    mine = [[g.clone() for g in reversed(step)] for step in own[backend.rank]]
    reduce = CompressedAllreduce(mine[0], backend)
    for step in mine:
        reduce(step)
    return [bits(step[::-1]) for step in mine]


@pytest.mark.parametrize("name", ["many buckets", "small buckets of the hook", "strides", "unused parameters", "bf16"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_error_feedback_is_conserved_in_every_step_also_when_ddp_forms_its_buckets_anew(
    world_size: int, name: str
) -> None:
    ranks = [rank[name] for rank in seen(world_size)]
    before: Any = 0.0
    for number in range(STEPS):
        own = torch.stack([_flat(rank.own[number]) for rank in ranks]).mean(0)
        after = _held([rank.states[number] for rank in ranks])
        said = _flat(ranks[0].means[number])
        # Whatever was given has been said or is held: rounding in fp32, or in bf16 of what was said.
        scale = float(torch.cat([own, said.nan_to_num(), after]).abs().max())
        off = float((own + before - said - after).nan_to_num().abs().max())
        assert off <= scale * (2.0**-8 if name == "bf16" else 2.0**-21), (number, off, scale)
        assert float(after.abs().max()) > 0
        before = after
    assert ranks[0].rebuilt == (name != "unused parameters")  # which DDP gives up for them
    assert bool(said.isnan().any()) == (name == "unused parameters")


def _flat(tensors: list[Tensor]) -> Tensor:
    """In float64, parameters from the last to the first, each as it lies in memory, as DDP's buckets have it."""
    return torch.cat([t.double().as_strided((t.numel(),), (1,)) for t in reversed(tensors)])


def _held(states: list[dict[str, Any]]) -> Tensor:
    """What the ranks together have not said yet: the mean of the workers' feedback, and the servers'."""
    (one,) = Residual.reshard(states, 1)
    held: Tensor = one["worker"].double() + one["server"].double()
    return held


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_get_the_same_bits(world_size: int) -> None:
    first, *others = seen(world_size)
    for name, run in first.items():
        for other in others:
            assert [bits(m) for m in other[name].means] == [bits(m) for m in run.means], name


def test_a_loaded_state_is_the_saved_one() -> None:
    for rank in seen(2):
        assert state_bits(rank["resumed"].states[-1]) == state_bits(rank["many buckets"].states[-1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_sent_are_those_of_the_formula(world_size: int) -> None:
    numels = [p.numel() for p in Rows().parameters()]
    for rank in seen(world_size):
        assert rank["one bucket"].sent == STEPS * wire_bytes(world_size, numels[::-1])


def others(backend: Backend) -> dict[str, Any]:
    """What needs no run of its own kind: learning, accumulation, a bad number, the loss scale."""
    return {
        "learns": [learn(backend, compressed) for compressed in (True, False)],
        "accumulated": [accumulate(pieces) for pieces in (4, 1)],
        "bad": bad_number(backend),
        "rescaled": rescaled(backend),
    }


@functools.cache
def seen_others(world_size: int) -> list[dict[str, Any]]:
    return run_ranks("gloo", world_size, others)


def learn(backend: Backend, compressed: bool) -> float:
    """Loss of a linear map learnt from each rank's own samples, after 150 steps of torch's AdamW; 1 before."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(24, 8, generator=generator)
    inner = nn.Linear(24, 8, bias=False)
    nn.init.zeros_(inner.weight)
    called = DistributedDataParallel(inner)
    if compressed:
        compress_gradients(called)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.05, weight_decay=0.0)
    generator.manual_seed(2 + backend.rank)
    for _ in range(150):
        x = torch.randn(16, 24, generator=generator)
        optimizer.zero_grad()
        (called(x) - x @ target).square().mean().backward()
        optimizer.step()
    return float((inner.weight.detach().T - target).square().mean() / target.square().mean())


def test_a_torch_optimizer_learns_what_it_learns_from_exact_means() -> None:
    for rank in seen_others(2):
        compressed, exact = rank["learns"]
        assert exact < 0.01  # it does learn
        assert compressed < 0.05  # Adam is not made for signs of gradients, yet feedback keeps it on its way


def accumulate(pieces: int) -> list[bytes]:
    """Small whole numbers, whose sums are exact: 4 batches of 1, or 1 of 4."""
    inner = nn.Linear(64, 32, bias=False)
    nn.init.zeros_(inner.weight)
    called = DistributedDataParallel(inner)
    compress_gradients(called)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        *first, last = torch.randint(-8, 8, (4, 64), generator=generator).float().chunk(pieces)
        optimizer.zero_grad()
        with called.no_sync():
            for part in first:
                called(part).sum().backward()
        called(last).sum().backward()
        optimizer.step()
    return bits(list(inner.parameters()))


def test_micro_batches_under_no_sync_equal_one_batch() -> None:
    for rank in seen_others(2):
        in_pieces, at_once = rank["accumulated"]
        assert in_pieces == at_once


def bad_number(backend: Backend) -> list[bool]:
    """Whether gradients are finite, in steps of which one has an infinity on one rank."""
    inner = model()
    called = DistributedDataParallel(inner)
    compress_gradients(called)
    finite = []
    for number in range(4):
        x = data(backend.rank, number)
        if number == 2 and backend.rank == 1:
            x[0, 0, 0, 0] = torch.inf
        called.zero_grad()
        backward(called, x)
        finite.append(all(bool(p.grad.isfinite().all()) for p in inner.parameters() if p.grad is not None))
    return finite


def test_a_bad_number_reaches_all_ranks_and_no_later_step() -> None:
    assert [rank["bad"] for rank in seen_others(2)] == [[True, True, False, True]] * 2


def rescaled(backend: Backend) -> bool:
    """A loss scale that doubles at the third step changes nothing but the scale, a power of two."""
    gradients = []
    for doubled in (1.0, 2.0):
        inner = make(Rows, torch.float32)
        called = DistributedDataParallel(inner)
        hook = compress_gradients(called)
        for number in range(4):
            if number == 2:
                hook.rescale(doubled)
            called.zero_grad()
            (called(data(backend.rank, number)).square().mean() * (doubled if number >= 2 else 1.0)).backward()
        gradients.append([p.grad.clone() / doubled for p in inner.parameters() if p.grad is not None])
    return bits(gradients[0]) == bits(gradients[1])


def test_feedback_follows_the_loss_scale() -> None:
    assert [rank["rescaled"] for rank in seen_others(2)] == [True, True]


def alone(backend: Backend) -> tuple[bool, int]:
    run = train(backend, SMALL)
    return [bits(m) for m in run.means] == [bits(g) for g in run.own], run.sent


def test_one_rank_compresses_nothing() -> None:
    assert run_ranks("gloo", 1, alone) == [(True, 0)]


def other_sizes(backend: Backend) -> str:
    """A state of other buckets: it can be loaded, and the next backward pass refuses it on every rank."""
    hooks: list[CompressedHook] = []
    for bucket_mb in (0.004, None):
        called = DistributedDataParallel(make(Rows, torch.float32))
        hooks.append(compress_gradients(called, bucket_mb=bucket_mb))
        if len(hooks) == 2:
            hooks[1].load_state_dict(hooks[0].state_dict())
        try:
            called(data(backend.rank, 0)).sum().backward()
        except InputError as error:
            return str(error)
    return "no error"


def test_a_state_of_other_buckets_is_refused_with_the_mend() -> None:
    for message in run_ranks("gloo", 2, other_sizes):
        assert "another bucket size" in message
        assert "use the old options" in message
