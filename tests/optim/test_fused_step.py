"""OnebitAdam's fused step is the unfused one to rounding, keeps no fp32 momentum, and lets the device decide alike."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from onebit.optim.fused import FusedMomentum
from tests.comm.samples import bits, state_bits
from tests.optim.samples import contents, feedback, gradients, parameters, patchy, step, through_a_file, values

FREEZE = 5
UNIT = 2.0**-24  # one rounding to fp32, relative
UNFUSED = SignCodec(kernels="reference")

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "coupled decay, maximize": {"adamw_mode": False, "weight_decay": 0.1, "maximize": True},
    "no bias correction": {"bias_correction": False},
    "small buckets": {"bucket_mb": 0.0003},
    "fresh variance": {"variance_refresh": 7},
    "two levels": {"local_group": 2, "bucket_mb": 0.0003},
}
TWO_LEVELS: dict[str, Any] = {"local_group": 2}


# 102 elements: the fewer there are, the less likely is one that rounding brings across zero.
FEW = (((5, 7), "rows"), ((), "rows"), ((0,), "rows"), ((12,), "rows"), ((6, 9), "transposed"))


def make(params: list[Any], backend: Backend, fused: bool = True, **options: Any) -> OnebitAdam:
    codec = None if fused else UNFUSED
    return OnebitAdam(params, **{"lr": 1e-2, "freeze_step": FREEZE, **options}, backend=backend, codec=codec)


def momenta(optimizer: OnebitAdam) -> list[Tensor]:
    return [state["exp_avg"] for _, state in sorted(optimizer.state_dict()["state"].items())]


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


@pytest.mark.parametrize(
    ("variant", "world_size", "seed"),
    [
        ("defaults", 2, 1),
        ("defaults", 3, 1),
        ("defaults", 4, 1),
        ("coupled decay, maximize", 3, 1),
        ("no bias correction", 2, 1),
        ("small buckets", 2, 1),
        ("fresh variance", 2, 1),
        ("two levels", 4, 1),
    ],
)
def test_220_steps_end_where_the_unfused_ones_end(variant: str, world_size: int, seed: int) -> None:
    """The two differ in where a product is rounded before it is added, never in what is computed.

    Measured after 220 steps, in roundings of the largest number of a tensor: parameters 2.3, momentum 7. The roundings
    of an update are far smaller than those of the parameter that it is added to. With these seeds rounding decides no
    sign, for one of those is worth a whole scale.
    """

    def train(backend: Backend, fused: bool) -> Any:
        params = parameters(FEW)
        optimizer = make(params, backend, fused, lr=1e-3, **VARIANTS[variant])
        for number in range(220):
            step(optimizer, gradients(params, backend.rank, 220 * seed + number))
        assert optimizer.kernels == ("cpu" if fused else "torch")
        return [p.detach() for p in params], momenta(optimizer), optimizer.stats.wire_bytes

    fused, unfused = run_threads(world_size, train, True), run_threads(world_size, train, False)
    for one, other in zip(fused[0][0], unfused[0][0], strict=True):
        assert largest(one - other) <= 8 * UNIT * max(largest(other), 1.0)
    for one, other in zip(fused[0][1], unfused[0][1], strict=True):
        assert largest(one - other) <= 32 * UNIT * largest(other)
    assert all(bits(rank[0]) == bits(fused[0][0]) for rank in fused)
    assert fused[0][2] == unfused[0][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("options", [{}, TWO_LEVELS], ids=str)
def test_fused_and_unfused_steps_are_the_same_bit_for_bit(
    dtype: torch.dtype, master: bool, coupled: bool, options: dict[str, Any]
) -> None:
    """So that a rank of a node which holds a slice of the state alone makes the steps of one that holds all of it."""
    chosen = {"master_weights": master, "adamw_mode": not coupled, "weight_decay": 0.1, "maximize": True, **options}

    def train(backend: Backend, fused: bool) -> Any:
        params = [*parameters(dtype=dtype), Parameter(values(9, shape=(40, 60)))]
        optimizer, seen = make(params, backend, fused, **chosen), []
        for number in range(FREEZE + 6):
            step(optimizer, patchy(params, backend.rank, number))
            seen.append(bits(params))
        return seen, feedback(optimizer), contents(optimizer)

    assert run_threads(4, train, True) == run_threads(4, train, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
def test_each_step_from_the_same_state_agrees_to_rounding(dtype: torch.dtype, master: bool, coupled: bool) -> None:
    """Dtypes, masters, missing gradients, any strides and dead entries; the momentum travels on as fp32 and as bits."""
    options: dict[str, Any] = {"master_weights": master, "adamw_mode": not coupled, "weight_decay": 0.1}

    def train(backend: Backend) -> None:
        params = [*parameters(dtype=dtype), Parameter(values(9, shape=(40, 60)))]
        twins = [Parameter(p.detach().clone()) for p in params]
        fused, unfused = make(params, backend, **options), make(twins, backend, False, **options)
        for number in range(FREEZE + 6):
            given = patchy(params, backend.rank, number)
            last = given[-1]
            if last is not None:
                last[values(1, shape=(40, 60)) < 0.5] = 0.0
            step(fused, given)
            step(unfused, given)
            unit = torch.finfo(dtype).eps / 2
            for p, twin in zip(params, twins, strict=True):
                assert p.stride() == twin.stride()
                # 8 roundings in fp32 of numbers like the parameter's; in the parameter's dtype they may end on either
                # side of one more rounding, which is then a whole unit off.
                near = (16 * UNIT + (2 * unit if p.dtype != torch.float32 else 0)) * max(largest(twin), 1.0)
                assert largest(p.float() - twin.float()) <= near, number
            if number >= FREEZE:  # go on from one state, so that differences do not add up
                assert not any("exp_avg" in state for state in fused.state.values())
            unfused.load_state_dict(through_a_file(fused.state_dict()))
            with torch.no_grad():
                for p, twin in zip(params, twins, strict=True):
                    twin.copy_(p)

    run_threads(2, train)


def test_a_saved_state_fits_torchs_own_adamw() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = make(params, backend)
        for number in range(FREEZE + 3):
            step(optimizer, gradients(params, backend.rank, number))
        saved = optimizer.state_dict()
        torchs = torch.optim.AdamW(params, fused=True)
        torchs.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
        for p in params:
            for key in ("exp_avg", "exp_avg_sq"):
                assert torchs.state[p][key].stride() == p.stride()
        torchs.step()

    run_threads(2, train)


def test_a_state_dict_keeps_its_momentum_while_the_optimizer_goes_on() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = make(params, backend)
        for number in range(FREEZE + 3):
            saved, was = optimizer.state_dict(), [bits(m) for m in momenta(optimizer)] if number > FREEZE else []
            step(optimizer, gradients(params, backend.rank, number))
            if number > FREEZE:
                assert [bits(state["exp_avg"]) for _, state in sorted(saved["state"].items())] == was

    run_threads(2, train)


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        *((size, options) for size in (2, 3) for options in ({}, {"variance_refresh": 3}, {"adamw_mode": False})),
        (4, TWO_LEVELS),
        (6, {"local_group": 3, "variance_refresh": 3}),
    ],
    ids=str,
)
def test_a_step_that_the_device_decides_about_is_the_step_that_the_host_decides_about(
    world_size: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; where the host undoes a bad step, both put error feedback back by the same operations."""

    def train(backend: Backend) -> list[Any]:
        params = [*parameters(), Parameter(values(9, shape=(40, 60)))]
        groups = [{"params": params[:4]}, {"params": params[4:], "lr": 1e-3}]  # a bad number is in one of them
        optimizer = make(groups, backend, **options)
        seen = []
        for number in range(FREEZE + 8):
            given = patchy(params, backend.rank, number)
            given[-1] = values(10, number, backend.rank, shape=(40, 60))
            if number in (2, FREEZE, FREEZE + 1, FREEZE + 4) and backend.rank == number % backend.size:
                given[-1][3, 4] = math.inf
            step(optimizer, given)
            seen.append((contents(optimizer), feedback(optimizer), optimizer.skipped_steps, optimizer.phase()))
        assert optimizer.skipped_steps == 4
        return seen

    by_host = run_threads(world_size, train)
    settled = []
    original = FusedMomentum.__init__

    def settling(self: FusedMomentum, *arguments: Any) -> None:
        original(self, *arguments)
        self.settles = True
        settled.append(self)

    monkeypatch.setattr(FusedMomentum, "__init__", settling)
    assert run_threads(world_size, train) == by_host
    assert len(settled) == 2 * world_size


def test_groups_in_other_phases_and_a_group_added_later_keep_their_own_way() -> None:
    def train(backend: Backend, fused: bool) -> Any:
        params, later = parameters(), [Parameter(values(9, shape=(17,)))]
        groups = [{"params": params[:3]}, {"params": params[3:5], "compress": False}, {"params": params[5:]}]
        optimizer = make(groups, backend, fused)
        for number in range(FREEZE + 4):
            step(optimizer, gradients(params, backend.rank, number))
        optimizer.add_param_group({"params": later})
        for number in range(FREEZE + 4):
            step(optimizer, gradients([*params, *later], backend.rank, 50 + number))
        held = ["exp_avg" in optimizer.state[p] for p in (*params, *later)]
        assert held == [not fused or 3 <= i < 5 for i in range(len(held))]
        return [p.detach() for p in (*params, *later)]

    for one, other in zip(run_threads(2, train, True)[0], run_threads(2, train, False)[0], strict=True):
        # 18 steps that round a few times each, as above.
        assert largest(one - other) <= 64 * UNIT * max(largest(other), 1.0)


def test_one_rank_and_a_codec_without_kernels_have_no_fused_step_and_say_so() -> None:
    def kernels(backend: Backend) -> list[str]:
        made = []
        for fused in (True, False):
            optimizer = make(parameters(), backend, fused, freeze_step=1)
            for number in range(3):
                step(optimizer, gradients(optimizer.param_groups[0]["params"], backend.rank, number))
            assert all(("exp_avg" in state) == (optimizer.kernels == "torch") for state in optimizer.state.values())
            made.append(optimizer.kernels)
        return made

    def on_one_node(backend: Backend) -> str:
        params = parameters()
        optimizer = make(params, backend, freeze_step=1, local_group=2)
        for number in range(3):
            step(optimizer, gradients(params, backend.rank, number))
        return optimizer.kernels

    assert run_threads(2, on_one_node) == ["torch"] * 2  # its mean comes in fp32
    assert run_threads(1, kernels) == [["torch", "torch"]]
    assert run_threads(2, kernels) == [["cpu", "torch"]] * 2


@pytest.mark.parametrize("shapes", [[(0,)], [(0, 4), ()], [(3,), (0,), (1,)]], ids=str)
def test_tensors_without_elements_are_in_no_part(shapes: list[tuple[int, ...]]) -> None:
    def train(backend: Backend) -> Any:
        params = [Parameter(values(i, shape=shape)) for i, shape in enumerate(shapes)]
        optimizer = make(params, backend)
        for number in range(FREEZE + 3):
            step(optimizer, gradients(params, backend.rank, number))
        return contents(optimizer)

    first, second = run_threads(2, train)
    assert first == second


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every new tensor that an operation of this thread returns, freed or not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors_in((arguments, options))}
        for t in tensors_in(result):
            if t.untyped_storage().data_ptr() not in given:
                self.bytes += t.untyped_storage().nbytes()
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


@pytest.mark.parametrize(("coupled", "shape"), [(False, (1 << 20,)), (True, (1 << 19, 2))])
def test_on_two_levels_a_rank_holds_no_momentum_in_fp32_and_a_step_takes_half_a_byte(
    coupled: bool, shape: tuple[int, ...]
) -> None:
    """Per parameter: variance 4, error feedback 4/k and 4/n, momentum 1/8 and 4/1024."""

    def train(backend: Backend) -> None:
        params = [Parameter(torch.zeros(shape)), Parameter(torch.zeros(1000))]
        numel = sum(p.numel() for p in params)
        optimizer = make(params, backend, adamw_mode=not coupled, freeze_step=1, **TWO_LEVELS)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(3):
            optimizer.step()
        with Allocations() as allocations:
            optimizer.step()
        (fused,) = optimizer._fused.values()
        residual = optimizer._reducers[0].residual
        state = [t for s in optimizer.state.values() for t in tensors_in(s)]
        buffers = [fused.payload(part) for part in fused.reduce.parts]
        held = sum(t.numel() * t.element_size() for t in [*state, *buffers, *residual.worker, *residual.server])
        assert held <= (4 + 4 / 2 + 4 / 4 + 0.2) * numel
        numbers = 4 * numel  # this transport copies what travels inside a node, all of which is fp32 here
        assert allocations.bytes - numbers <= 0.5 * numel, allocations.bytes / numel

    run_threads(4, train)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("coupled", [False, True])
def test_the_compressed_phase_holds_8_2_plus_4_over_n_bytes_and_a_step_takes_half_a_byte(
    world_size: int, coupled: bool
) -> None:
    """Per parameter: variance 4, error feedback 4 and 4/n, momentum 1/8 and 4/1024; what travels is temporary."""
    shapes = [(1 << 20,), (1 << 18, 3), (1000,), ()]

    def train(backend: Backend) -> None:
        params = [Parameter(torch.zeros(shape)) for shape in shapes]
        numel = sum(p.numel() for p in params)
        optimizer = make(params, backend, adamw_mode=not coupled, freeze_step=1)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(3):
            optimizer.step()
        with Allocations() as allocations:
            tracemalloc.start()  # NumPy's arrays and Python's own objects; of all ranks, for they are threads
            optimizer.step()
            backend.barrier()
            taken = tracemalloc.get_traced_memory()[1]
            backend.barrier()
            tracemalloc.stop()
        (fused,) = optimizer._fused.values()
        buffers = [fused.payload(part) for part in fused.reduce.parts]
        masks = [part.mask for part in fused.reduce.parts if part.mask is not None]
        feedback = [*optimizer._reducers[0].residual.worker, *optimizer._reducers[0].residual.server]
        state = [t for s in optimizer.state.values() for t in tensors_in(s)]
        held = sum(t.numel() * t.element_size() for t in [*state, *buffers, *masks, *feedback])
        assert held <= (8.2 + 4 / world_size) * numel
        sent = sum(part.sent.numel() for part in fused.reduce.parts)
        wire = sent * (3 + 1 / world_size)  # sent, received, the mean of a chunk, gathered
        copies = sent * (1 + 1 / world_size)  # which this transport makes of what it is given
        new = allocations.bytes - copies
        assert wire + new <= 0.5 * numel, (wire / numel, new / numel)
        assert taken <= 0.1 * numel, taken

    run_threads(world_size, train)


@pytest.mark.parametrize(("world_size", "options"), [(2, {}), (4, TWO_LEVELS)], ids=str)
def test_what_was_saved_by_either_is_loaded_by_the_other(world_size: int, options: dict[str, Any]) -> None:
    def train(backend: Backend, first: bool) -> None:
        params = parameters()
        one = make(params, backend, first, **options)
        for number in range(FREEZE + 2):
            step(one, gradients(params, backend.rank, number))
        saved = through_a_file(one.state_dict())
        other = make(params, backend, not first, **options)
        other.load_state_dict(saved)
        assert state_bits(other.state_dict()["state"]) == state_bits(one.state_dict()["state"])
        step(other, gradients(params, backend.rank, FREEZE + 2))

    run_threads(world_size, train, True)
    run_threads(world_size, train, False)
