"""OnebitLamb's fused step: its kernels by float64, and the optimizer as its unfused one to rounding, equal on ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, Part, run_threads
from onebit.compress import SignCodec
from onebit.compress.masks import pack_mask
from onebit.optim import OnebitLamb, check_replicas
from onebit.optim.fused import FusedMomentum
from onebit.optim.gpu.lamb import LayerwiseUpdate
from onebit.optim.lamb import Layers
from tests.comm.checks import Check, Failures, assert_passed, failures_of, short
from tests.comm.launcher import run_ranks
from tests.comm.samples import state_bits
from tests.gpu.lamb_paths import UNIT, assert_together, path_of
from tests.gpu.test_fused_step import no_synchronisation
from tests.optim.samples import contents, parameters, patchy, step, through_a_file, values

DEVICE = "cuda"
SIZES = [3000, 1, 5 * 1024, 40, 300_000]  # the last has so many blocks that several warps put them together
LASTS = [1.0, 0.5, 1.0, 1.1, 0.2]  # r before the step
GROUP = {
    "betas": (0.9, 0.99),
    "eps": 1e-6,
    "bias_correction": True,
    "factor_min": 0.25,
    "factor_max": 3.0,
    "factor_threshold": 0.75,
}
DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp16": [torch.float16],
    "mixed": [torch.float16, torch.float32, torch.bfloat16],
}


# --- the kernels


@dataclass
class Case:
    """The state of a few tensors before a step, on the CPU, and what their parts have received, on the device."""

    parts: list[Part]
    payloads: list[Tensor]
    old: list[Tensor]
    new: list[Tensor]
    variances: list[Tensor]
    fresh: list[Tensor]
    values: list[Tensor]
    masters: list[Tensor | None]
    dead: list[Tensor] | None


def case_of(dtypes: Sequence[torch.dtype], masked: bool, bucket: int | None, mastered: bool = False) -> Case:
    """Buckets that hold pieces of tensors, where `bucket` is a number of elements."""
    codec = SignCodec(kernels="reference")
    variances = [torch.rand(n) * 10.0**-i + 1e-9 for i, n in enumerate(SIZES)]
    variances[2][70] = 1e-40  # needs care with its root
    dead = None
    if masked:
        dead = [torch.zeros(n, dtype=torch.bool) for n in SIZES]
        dead[0][5:700], dead[3][:], dead[4][2050:2100] = True, True, True
        variances = [torch.where(d, 0.0, v) for d, v in zip(dead, variances, strict=True)]
    fresh = [v * (0.5 + torch.rand(v.shape)) for v in variances]
    old, new = [torch.empty(n) for n in SIZES], [torch.empty(n) for n in SIZES]
    parts, payloads = [], []
    for planned in codec.plan(SIZES, 2, bucket):
        layout, used = planned.of_used_tensors()
        mask = None if dead is None else pack_mask([dead[i].to(DEVICE) for i in used], layout)
        sent = []
        for whole in (old, new):
            given = [torch.randn(SIZES[i]) * variances[i].max().sqrt() for i in used]
            sent.append(codec.encode(given, layout=layout, mask=None if mask is None else mask.cpu()))
            codec.decode(sent[-1], [whole[i] for i in used], layout=layout, mask=None if mask is None else mask.cpu())
        residual = torch.zeros(layout.padded_numel, device=DEVICE)
        gathered = sent[1].to(DEVICE, copy=True)
        parts.append(
            Part(
                layout=layout,
                used=used,
                residual=residual,
                mask=mask,
                sent=torch.zeros_like(gathered),
                gathered=gathered,
                squared=False,
            )
        )
        payloads.append(sent[0].to(DEVICE, copy=True))
    numbers = [torch.randn(n).to(dtypes[i % len(dtypes)]) for i, n in enumerate(SIZES)]
    masters = [torch.randn(x.numel()) if mastered and x.dtype != torch.float32 else None for x in numbers]
    return Case(parts, payloads, old, new, variances, fresh, numbers, masters, dead)


def on_device(tensors: Sequence[Tensor | None], unaligned: bool) -> list[Any]:
    """Copies; unaligned: starting one element after an aligned address."""
    copies: list[Any] = []
    for t in tensors:
        if t is None:
            copies.append(None)
            continue
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)
        copies.append(memory[unaligned : t.numel() + unaligned].copy_(t))
    return copies


@dataclass
class Made:
    """What a step has made of a case, on the CPU."""

    values: list[Tensor]
    masters: list[Tensor | None]
    fresh: list[Tensor]
    payloads: list[Tensor]
    layers: Layers
    steps: Tensor


def make(
    case: Case, group: dict[str, Any], packed: bool = True, unaligned: bool = False, proceed: Tensor | None = None
) -> Made:
    layerwise = LayerwiseUpdate(SIZES, list(reversed(range(len(SIZES)))), torch.device(DEVICE))
    layers = Layers([{} for _ in SIZES], torch.device(DEVICE))
    layers.coeff_mean.copy_(torch.arange(1.0, 6.0) / 7)
    layers.coeff_weight.fill_(0.7)
    layers.factor.copy_(torch.tensor(LASTS))
    steps, variance_steps = torch.full((5,), 29.0, device=DEVICE), torch.full((5,), 20.0, device=DEVICE)
    lists = (case.values, case.masters, case.variances, case.fresh, case.old)
    x, masters, v, fresh, old = (on_device(t, unaligned) for t in lists)
    payloads = [payload.clone() if packed else torch.zeros_like(payload) for payload in case.payloads]
    layerwise.begin(steps, variance_steps, layers, group, proceed)
    for part, payload in zip(case.parts, payloads, strict=True):
        mine = [[tensors[i] for i in part.used] for tensors in (x, masters, v, fresh)]
        momentum = payload if packed else [old[i] for i in part.used]
        layerwise.update(part, part.used[0], *mine, momentum, payload, group, proceed)  # type: ignore[arg-type]
    layerwise.finish(layers, group, proceed)
    on_host = [[None if t is None else t.cpu() for t in tensors] for tensors in (x, masters, fresh, payloads)]
    return Made(*on_host, layers, steps.cpu())  # type: ignore[arg-type]


def by_float64(case: Case, group: dict[str, Any], index: int) -> tuple[Tensor, float, Tensor, Tensor]:
    """v′, the next r, x and how far rounding may put it off, of one tensor."""
    beta1, beta2 = group["betas"]
    last, mean = LASTS[-1 - index], 0.1 * (5 - index) / 0.49  # `make` turns the order round
    m, old, v, fresh = (t[index].double() for t in (case.new, case.old, case.variances, case.fresh))
    master = case.masters[index]
    x = (case.values[index] if master is None else master).double()
    g = (m - beta1 * old) / (1 - beta1)
    fresh = beta2 * fresh + (1 - beta2) * g * g
    rate, root, now = 1 / (1 - beta1**30), (1 - beta2**20) ** -0.5, (1 - beta2**30) ** -0.5
    d = v.sqrt() * root + group["eps"]
    ratios = d / (fresh.sqrt() * now + group["eps"])
    if case.dead is not None:
        ratios = ratios[~case.dead[index]]
    ratio = float(ratios.max()) if ratios.numel() else 1.0
    plain = rate * m / d
    u = plain + group["weight_decay"] * x
    if group["weight_decay"]:
        share = min(float(plain.norm() / u.norm()), 1.0) if float(u.norm()) > 0 else 1.0
        ratio = ratio * share + 1 - share
    low, high = (last * (1 + sign * group["factor_threshold"]) for sign in (-1, 1))
    ratio = min(max(min(max(ratio, group["factor_min"]), group["factor_max"]), low), high)
    move = group["lr"] * mean * last
    # Some ten roundings of u₀ and of what is added to it, and one of x.
    slack = UNIT * (16 * move * (plain.abs() + group["weight_decay"] * x.abs()) + x.abs())
    return fresh, ratio, x - move * u, slack


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_a_step_and_the_next_factors_are_those_of_float64(dtypes: Sequence[torch.dtype]) -> None:
    torch.manual_seed(0)
    for masked, bucket, packed, unaligned, decay in itertools.product(
        (False, True), (None, sum(SIZES) // 3), (True, False), (False, True), (0.0, 0.3)
    ):
        mastered = decay == 0.0 if bucket else decay > 0
        case, group = case_of(dtypes, masked, bucket, mastered), {**GROUP, "lr": 1e-2, "weight_decay": decay}
        made = make(case, group, packed, unaligned)
        told = f"masked {masked}, bucket {bucket}, packed {packed}, unaligned {unaligned}, decay {decay}, {mastered}"
        assert made.steps.tolist() == [30.0] * 5, told
        for part, payload in zip(case.parts, made.payloads, strict=True):
            assert torch.equal(payload, part.gathered.cpu()), f"{int((payload != part.gathered.cpu()).sum())} of {told}"
        for i in range(len(SIZES)):
            fresh, ratio, x, slack = by_float64(case, group, i)
            # g is the difference of two momenta, each of which is rounded; its square doubles that.
            most = 4 * UNIT * (fresh + 2 * (case.new[i].abs() + case.old[i].abs()).double() ** 2)
            off = (made.fresh[i].double() - fresh).abs() - most
            assert float(off.max()) <= 0, f"v' {i} is off by {float(off.max())} more than rounding; {told}"
            found = float(made.layers.factor[len(SIZES) - 1 - i])
            # Some ten roundings an element of which the largest counts, and sums over 1024 in fp32.
            assert found == pytest.approx(ratio, rel=1e-5), f"r of {i}; {told}"
            master, value = made.masters[i], made.values[i]
            wide = value.double() if master is None else master.double()
            if master is None and value.dtype != torch.float32:
                slack = slack + torch.finfo(value.dtype).eps * x.abs() + torch.finfo(value.dtype).tiny
            off = (wide - x).abs() - slack
            assert float(off.max()) <= 0, f"x {i} is off by {float(off.max())} more than rounding; {told}"
            assert master is None or torch.equal(value, master.to(value.dtype)), f"parameter {i} of its master; {told}"


def test_nothing_changes_where_the_step_does_not_proceed() -> None:
    case, group = case_of([torch.bfloat16], True, None, True), {**GROUP, "lr": 1e-2, "weight_decay": 0.1}
    for packed in (False, True):
        made = make(case, group, packed, proceed=torch.zeros((), dtype=torch.bool, device=DEVICE))
        assert made.steps.tolist() == [29.0] * 5
        for now, before in ((made.fresh, case.fresh), (made.values, case.values), (made.masters, case.masters)):
            assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))  # type: ignore[arg-type]
        for now, payload in zip(made.payloads, case.payloads, strict=True):
            assert torch.equal(now, payload.cpu() if packed else torch.zeros_like(now))
        assert made.layers.factor.cpu().tolist() == pytest.approx(LASTS)
        assert made.layers.coeff.cpu().tolist() == [1.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_on_the_device_is_read_there(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    case = case_of([torch.float32], False, None)
    by_number = make(case, {**GROUP, "lr": 0.25, "weight_decay": 0.1})
    on_there = make(case, {**GROUP, "lr": torch.tensor(0.25, dtype=dtype, device=DEVICE), "weight_decay": 0.1})
    for x, y, before in zip(on_there.values, by_number.values, case.values, strict=True):
        assert torch.equal(x, y)
        assert not torch.equal(x, before)


# --- the optimizer

FREEZE = 4
HAS_FACTOR = {"factor_min": 0.5, "factor_max": 4.0}
NO_FACTOR = {"factor_min": 1.0, "factor_max": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no decay, maximize": {"weight_decay": 0.0, "maximize": True},
    "small buckets, strong decay": {"bucket_mb": 0.005, "weight_decay": 0.5},
    "no bias correction": {"bias_correction": False},
    "no factor": NO_FACTOR,
    "no factor, no decay, maximize": {**NO_FACTOR, "weight_decay": 0.0, "maximize": True},
    "no factor, small buckets, strong decay": {**NO_FACTOR, "bucket_mb": 0.005, "weight_decay": 0.5},
    "two levels": {"local_group": 2},
    "two levels, no factor": {**NO_FACTOR, "local_group": 2},
}


def start(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Small tensors of any strides, and two of more than a block, of which one has dead entries."""
    params = [*parameters(dtype=dtype), *(Parameter(values(n, shape=(40, n)).to(dtype)) for n in (60, 64))]
    return [Parameter(p.detach().to(DEVICE)) for p in params]


def given(params: Sequence[Tensor], rank: int, number: int) -> list[Tensor | None]:
    """This rank's gradients; some are None, and half of the tensor before the last never has any."""
    made = patchy([p.detach().cpu() for p in params], rank, number)
    dead = made[7]
    if dead is not None:
        dead[values(1, shape=(40, 60)) < 0.5] = 0.0
    return [None if g is None else g.to(DEVICE) for g in made]


def optimizer_of(params: Any, backend: Backend, fused: bool = True, **options: Any) -> OnebitLamb:
    """One with a factor, unless `options` say otherwise."""
    codec = None if fused else SignCodec(kernels="reference")
    usual = {"lr": 1e-2, "freeze_step": FREEZE, **HAS_FACTOR}
    made = OnebitLamb(params, **{**usual, **options}, backend=backend, codec=codec)
    assert made.kernels == ("gpu" if fused else "torch")
    return made


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_40_steps_end_where_the_unfused_ones_end(variant: str, world_size: int) -> None:
    def train(backend: Backend, fused: bool) -> Any:
        params = start()
        optimizer = optimizer_of(params, backend, fused, **VARIANTS[variant])
        path = path_of(optimizer, params, lambda number: given(params, backend.rank, number), 40)
        saved = optimizer.state_dict()["state"]
        fresh = [state["exp_avg_sq_fresh"].cpu() for _, state in sorted(saved.items()) if "exp_avg_sq_fresh" in state]
        return path, fresh, optimizer.param_groups[0]

    ranks = world_size * VARIANTS[variant].get("local_group", 1)
    per_rank = run_threads(ranks, train, True)
    by_torch, by_torch_fresh, group = run_threads(ranks, train, False)[0]
    for path, fresh, _ in per_rank:
        assert_together(path, by_torch, group)
        for i, (v, w) in enumerate(zip(fresh, by_torch_fresh, strict=True)):
            if v.numel():
                # The squared difference of momenta doubles what they are off by; measured: 3.4 roundings.
                off = float((v - w).abs().max() / w.abs().max()) / UNIT
                assert off <= 16, f"fresh variance {i} is {off} roundings off"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master", [False, True], ids=["plain", "masters"])
@pytest.mark.parametrize("has_factor", [True, False], ids=["factor", "no factor"])
def test_replicas_are_bit_equal_and_a_saved_run_goes_on_bit_for_bit(
    dtype: torch.dtype, master: bool, has_factor: bool
) -> None:
    options = {"master_weights": master, **(HAS_FACTOR if has_factor else NO_FACTOR)}

    def train(backend: Backend, stops: Sequence[int]) -> list[Any]:
        params = start(dtype)
        optimizer = optimizer_of(params, backend, **options)
        seen: list[Any] = []
        for number in range(FREEZE + 6):
            if number in stops:
                saved = through_a_file(optimizer.state_dict())
                params = [Parameter(p.detach().clone()) for p in params]
                optimizer = optimizer_of(params, backend, **options)
                optimizer.load_state_dict(saved)
            step(optimizer, given(params, backend.rank, number))
            seen.append((contents(optimizer), optimizer.lamb_coefficients()["factor"].tolist()))
        return seen

    first, other = run_threads(2, train, ())
    assert other == first
    assert len({repr(seen) for seen in first}) == FREEZE + 6
    assert run_threads(2, train, (FREEZE, FREEZE + 1, FREEZE + 3)) == [first, first]


def test_a_step_that_the_device_decides_about_is_the_step_that_the_host_decides_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(backend: Backend, settles: bool) -> list[Any]:
        params = start()
        groups = [{"params": params[:4], **NO_FACTOR}, {"params": params[4:], "lr": 1e-3}]  # a bad number is in one
        optimizer = optimizer_of(groups, backend)
        seen = []
        for number in range(FREEZE + 8):
            mine = given(params, backend.rank, number)
            last = values(10, number, backend.rank, shape=(40, 64)).to(DEVICE)
            if number in (2, FREEZE, FREEZE + 1, FREEZE + 4) and backend.rank == number % backend.size:
                last[3, 4] = math.inf
            mine[-1] = last
            step(optimizer, mine)
            for one in optimizer._fused.values():
                one.settles = settles
            told = [row.tolist() for row in optimizer.lamb_coefficients(1).values()]
            extra = state_bits(optimizer.state_dict()["onebit"])
            seen.append((contents(optimizer), extra, optimizer.skipped_steps, optimizer.phase(), told))
        assert optimizer.skipped_steps == 4
        return seen

    original = FusedMomentum.__init__
    made = []

    def counting(self: FusedMomentum, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(FusedMomentum, "__init__", counting)
    assert run_threads(2, train, True) == run_threads(2, train, False)
    assert len(made) == 8


def test_dead_entries_move_by_decay_alone_and_going_back_to_dense_steps_takes_the_momentum_along() -> None:
    def train(backend: Backend) -> None:
        params = start()
        optimizer = optimizer_of(params, backend, weight_decay=0.0)
        dead = (values(1, shape=(40, 60)) < 0.5).to(DEVICE)
        before = params[7].detach()[dead]
        for number in range(FREEZE + 5):
            step(optimizer, given(params, backend.rank, number))
        assert torch.equal(params[7].detach()[dead], before)
        assert all("exp_avg" not in state for state in optimizer.state.values())
        saved = optimizer.state_dict()["state"]
        optimizer.param_groups[0]["freeze_step"] = 100
        optimizer.param_groups[0]["compress"] = False
        step(optimizer, [torch.zeros_like(p) for p in params])
        for i, p in enumerate(params):
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], saved[i]["exp_avg"] * 0.9)

    run_threads(2, train)


# --- over NCCL


def ready(backend: Backend, options: Mapping[str, float]) -> tuple[OnebitLamb, list[Parameter]]:
    """An optimizer of one tensor of many blocks and small ones, two compressed steps after the freeze."""
    params = [Parameter(torch.ones(shape, device=DEVICE)) for shape in [(3 << 20,), (1000, 7), (1,), ()]]
    optimizer = optimizer_of(params, backend, freeze_step=1, **options)
    for p in params:
        p.grad = torch.randn(p.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(backend.rank))
    for _ in range(3):
        optimizer.step()
    return optimizer, params


def gradient(p: Tensor) -> Tensor:
    """The gradient in place, flat."""
    assert p.grad is not None
    return p.grad.view(-1)


def check_a_step_waits_for_nothing_good_or_bad(backend: Backend, options: Mapping[str, float] = HAS_FACTOR) -> None:
    optimizer, params = ready(backend, options)
    with no_synchronisation():
        for number in range(6):
            gradient(params[0])[77:78].fill_(torch.nan if number in (2, 3) and backend.rank == 0 else 1.0)
            optimizer.step()
    assert optimizer.skipped_steps == 2
    assert optimizer.param_groups[0]["step"] == 7
    check_replicas(optimizer)


def check_a_step_without_a_factor_waits_for_nothing_good_or_bad(backend: Backend) -> None:
    check_a_step_waits_for_nothing_good_or_bad(backend, NO_FACTOR)


def check_its_work_can_be_captured_and_replayed(backend: Backend, options: Mapping[str, float] = HAS_FACTOR) -> None:
    eager, eager_params = ready(backend, options)
    optimizer, params = ready(backend, options)

    def work() -> None:
        with torch.no_grad():
            exchange: Any = optimizer._exchange(optimizer.param_groups[0], optimizer._of_groups()[0])
            exchange.sending.finish()
            exchange.settle(exchange.all_finite())

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for number in range(3):
        if number:
            graph.replay()
        eager.step()
        torch.cuda.synchronize()
        for i, (p, q) in enumerate(zip(params, eager_params, strict=True)):
            wrong = int((p != q).sum())
            assert not wrong, f"after {number} replays {wrong} of {p.numel()} of parameter {i} differ from eager steps"


def check_work_without_a_factor_can_be_captured_and_replayed(backend: Backend) -> None:
    check_its_work_can_be_captured_and_replayed(backend, NO_FACTOR)


CHECKS: list[Check] = [
    check_a_step_waits_for_nothing_good_or_bad,
    check_a_step_without_a_factor_waits_for_nothing_good_or_bad,
    check_its_work_can_be_captured_and_replayed,
    check_work_without_a_factor_can_be_captured_and_replayed,
]


@pytest.fixture(scope="module")
def failures() -> list[Failures]:
    return run_ranks("nccl", 2, failures_of, CHECKS, timeout=240.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("check", CHECKS, ids=short)
def test_over_nccl(failures: list[Failures], check: Check) -> None:
    assert_passed(failures, check.__name__)
