"""CPUAdam is Adam: torch's own optimizers and a definition in float64 say what a step must give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from onebit.compress import InputError, set_num_threads
from onebit.optim import CPUAdam
from tests.optim.adam_inputs import torch_inputs
from tests.optim.adam_oracle import Shadow
from tests.optim.samples import parameters, values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPS = 100
NAMES = {"AdamW": True, "Adam": False}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    set_num_threads(None)


def is_refused(options: dict[str, Any]) -> bool:
    return bool(options.get("amsgrad") or options.get("capturable"))


def give_gradients(params: list[Parameter], others: list[Parameter], step: int, patchy: bool = False) -> None:
    """The same gradients to both; `patchy`: some parameters have none now and then, one has none in the first steps."""
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        g = values(3, i, step, shape=tuple(p.shape)).to(p.dtype) * 10.0 ** (i % 4 - 2)
        absent = patchy and ((step + i) % 3 == 0 or (i == 2 and step < 5))
        p.grad, q.grad = (None, None) if absent else (g.clone(), g.clone())


def assert_close(ours: list[Parameter], theirs: list[Parameter], optimizers: tuple[Any, Any], lr: float) -> None:
    """To 1e-6 of what was added up in an element: its value, and at most 2·lr a step."""
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6 * 2 * lr * STEPS)
        mine, its = (o.state[x] for o, x in zip(optimizers, (p, q), strict=True))
        assert mine.keys() == its.keys()
        for key in mine:
            scale = float(its[key].abs().max()) if its[key].numel() else 0.0
            torch.testing.assert_close(mine[key], its[key], rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inputs", torch_inputs(), ids=lambda x: x.desc)
def test_equals_torch_over_100_steps_with_the_options_that_torch_tests(inputs: Any, name: str) -> None:
    options = dict(inputs.kwargs)
    ours, theirs = parameters(), parameters()
    if is_refused(options):
        with pytest.raises(InputError, match="is refused"):
            CPUAdam(ours, **options)
        return
    torchs = getattr(torch.optim, name)(theirs, **{"weight_decay": 1e-2, **options})
    optimizer = CPUAdam(ours, adamw_mode=NAMES[name], **options)
    for step in range(STEPS):
        give_gradients(ours, theirs, step)
        optimizer.step()
        torchs.step()
    assert_close(ours, theirs, (optimizer, torchs), float(options.get("lr", 1e-3)))


@pytest.mark.parametrize("options", [{"betas": (0.0, 0.0)}, {"betas": (0.3, 0.5)}, {"eps": 1e-3}, {"lr": 0.0}], ids=str)
def test_equals_torch_at_the_ends_of_the_options(options: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, torchs = CPUAdam(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(STEPS):
        give_gradients(ours, theirs, step)
        optimizer.step()
        torchs.step()
    assert_close(ours, theirs, (optimizer, torchs), options.get("lr", 1e-3))


def test_equals_torch_with_missing_gradients_and_counts_steps_per_parameter() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, torchs = CPUAdam(ours), torch.optim.AdamW(theirs)
    for step in range(STEPS):
        give_gradients(ours, theirs, step, patchy=True)
        optimizer.step()
        torchs.step()
    assert_close(ours, theirs, (optimizer, torchs), 1e-3)
    assert {float(optimizer.state[p]["step"]) for p in ours} > {64.0}


def test_groups_schedulers_and_closures_act_as_in_torch() -> None:
    ours, theirs = parameters(), parameters()

    def groups(params: list[Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:3], "lr": 0.01},
            {"params": params[3:5], "weight_decay": 0.0},
            {"params": params[5:]},
        ]

    optimizer, torchs = CPUAdam(groups(ours)), torch.optim.AdamW(groups(theirs))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=STEPS) for o in (optimizer, torchs)]
    for step in range(STEPS):
        give_gradients(ours, theirs, step)
        assert optimizer.step(lambda: torch.tensor(2.5) if torch.is_grad_enabled() else None) == 2.5
        torchs.step()
        for schedule in schedules:
            schedule.step()
    assert_close(ours, theirs, (optimizer, torchs), 0.01)


def test_a_scheduler_that_changes_a_tensor_lr_in_place_acts() -> None:
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(0.1)
    optimizer, torchs = CPUAdam(ours, lr=lr), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(3):
        give_gradients(ours, theirs, step)
        lr.fill_(0.1 / (step + 1))
        optimizer.param_groups[0]["lr"].fill_(float(lr))
        torchs.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
        torchs.step()
    assert_close(ours, theirs, (optimizer, torchs), 0.1)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("adamw_mode", [True, False])
@pytest.mark.parametrize("moments", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_step_of_16_bit_values_is_right_to_their_rounding(
    dtype: torch.dtype, moments: torch.dtype | None, adamw_mode: bool, bias_correction: bool
) -> None:
    params = parameters(dtype=dtype)
    optimizer = CPUAdam(
        params,
        lr=0.01,
        weight_decay=0.1,
        adamw_mode=adamw_mode,
        bias_correction=bias_correction,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
    )
    for step in range(20):
        give_gradients(params, params, step, patchy=True)
        shadow = Shadow(optimizer, params)
        optimizer.step()
        shadow.check()
    assert all(optimizer.state[p]["exp_avg"].dtype == (moments or torch.float32) for p in params)


def test_one_step_of_bf16_with_bf16_moments_is_that_of_torchs_fused_kernel() -> None:
    """Both compute in fp32 and round once: to the same number, or where fp32's last digits decide to a neighbour."""
    ours, theirs = (parameters(dtype=torch.bfloat16) for _ in range(2))
    optimizer = CPUAdam(ours, fp32_optimizer_states=False)
    torchs = torch.optim.AdamW(theirs, fused=True)
    give_gradients(ours, theirs, 0)
    for q in theirs:  # torch's kernel reads a gradient in the memory order of the parameter
        q.grad = torch.empty_like(q).copy_(q.grad)
    optimizer.step()
    torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2.0**-7, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][key].dtype == torch.bfloat16
            torch.testing.assert_close(optimizer.state[p][key], torchs.state[q][key], rtol=2.0**-7, atol=0)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int], bool]:
    """Shape, order of the dimensions in memory, and whether there are gaps."""
    shape = draw(st.lists(st.integers(0, 9) | st.just(40), max_size=4))
    return shape, draw(st.permutations(range(len(shape)))), draw(st.booleans())


def laid(values: Tensor, order: list[int], gaps: bool) -> Tensor:
    """The same values with dimensions in another order in memory, and every other element unused where `gaps`."""
    room = values.permute(order).contiguous()
    if gaps and room.ndim:
        room = torch.stack((room, torch.full_like(room, torch.nan)), dim=-1)[..., 0]
    return room.permute([order.index(d) for d in range(len(order))])


@settings(max_examples=60)
@given(
    st.lists(st.tuples(layouts(), st.integers(0, 3), *[st.sampled_from(DTYPES)] * 2), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_shape_order_dtype_and_missing_gradient(tensors: list[Any], maximize: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for (shape, order, gaps), _, dtype, _ in tensors:
        params.append(Parameter(laid(torch.randn(shape, generator=generator).to(dtype), order, gaps)))
    optimizer = CPUAdam(params, lr=0.05, maximize=maximize)
    for step in range(3):
        for p, ((shape, order, gaps), kind, _, dtype) in zip(params, tensors, strict=True):
            g = torch.randn(shape, generator=generator).to(dtype)
            p.grad_dtype = dtype if hasattr(p, "grad_dtype") else None
            g = g if hasattr(p, "grad_dtype") else g.to(p.dtype)
            p.grad = None if kind == step else g if kind == 1 else laid(g, order[::-1], gaps)
        shadow = Shadow(optimizer, params)
        optimizer.step()
        shadow.check()


def test_gaps_of_a_parameter_are_not_written() -> None:
    room = torch.full((6, 10), 7.0)
    p = Parameter(room[:, ::2])
    p.grad = torch.ones(6, 5)
    CPUAdam([p]).step()
    assert torch.equal(room[:, 1::2], torch.full((6, 5), 7.0))
    assert bool((room[:, ::2] < 7).all())


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    shapes = [(70_001,), (3,), (0,), (129, 1025), (31,), (200_000,)]

    def run(count: int) -> list[Parameter]:
        set_num_threads(count)
        params = [Parameter(values(i, shape=shape)) for i, shape in enumerate(shapes)]
        optimizer = CPUAdam(params)
        for step in range(2):
            give_gradients(params, params, step)
            optimizer.step()
        return params

    for p, q in zip(run(1), run(threads), strict=True):
        assert torch.equal(p, q)


def test_neighbours_of_a_tensor_change_no_bit() -> None:
    together, alone = parameters(), parameters()
    optimizer = CPUAdam(together)
    singles = [CPUAdam([p]) for p in alone]
    for step in range(3):
        give_gradients(together, alone, step, patchy=True)
        optimizer.step()
        for single in singles:
            single.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


MOVES = ("nothing", "gradients", "parameter", "view", "dtype", "moment", "moment data", "order", "cleared state")


@pytest.mark.parametrize("move", MOVES)
def test_what_moves_between_steps_is_found(move: str) -> None:
    """Addresses are kept from step to step; what a user puts elsewhere must not be read or written where it was."""
    ours, theirs = parameters(), parameters()
    optimizer, torchs = CPUAdam(ours), torch.optim.AdamW(theirs)
    for step in range(4):
        give_gradients(ours, theirs, step)
        if step == 2:
            for params, its in ((ours, optimizer), (theirs, torchs)):
                p, state = params[3], its.state[params[3]]
                if move == "gradients":
                    p.grad = torch.stack((p.grad, p.grad), dim=1)[:, 0]  # type: ignore[arg-type]
                elif move == "parameter":
                    p.data = p.data.clone()
                elif move == "view":
                    p.data, p.grad = p.data[:31], p.grad[:31]  # type: ignore[index]
                    state.update({key: state[key][:31].clone() for key in ("exp_avg", "exp_avg_sq")})
                elif move == "dtype":
                    p.grad = None
                    p.data = p.data.to(torch.bfloat16).float()
                elif move == "moment":
                    state["exp_avg"] = torch.ones_like(p)
                elif move == "moment data":
                    state["exp_avg_sq"].data = torch.ones_like(p)
                elif move == "order":
                    p, state = params[-1], its.state[params[-1]]
                    square = torch.arange(54.0).view(9, 6)
                    p.data = square.t() if step else square
                elif move == "cleared state":
                    del its.state[p]
        optimizer.step()
        torchs.step()
    assert_close(ours, theirs, (optimizer, torchs), 1e-3)


def test_gradients_are_not_kept_alive() -> None:
    p = Parameter(torch.zeros(1000))
    p.grad = torch.ones(1000)
    optimizer = CPUAdam([p])
    optimizer.step()
    counted = torch.ones(1000)
    p.grad = counted
    optimizer.step()
    before = counted.untyped_storage()._weak_ref()  # type: ignore[attr-defined]
    p.grad = None
    del counted
    assert torch.UntypedStorage._expired(before)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_the_rounded_parameters_after_every_step(dtype: torch.dtype) -> None:
    params = parameters()
    copies = {p: torch.empty_like(p, dtype=dtype, requires_grad=False) for p in params[1:]}
    optimizer = CPUAdam(params, lr=0.1)
    optimizer.keep_copies(copies)
    assert all(torch.equal(copy, p.to(dtype)) for p, copy in copies.items())
    addresses = [copy.data_ptr() for copy in copies.values()]
    for step in range(3):
        give_gradients(params, params, step, patchy=True)
        optimizer.step()
        assert all(torch.equal(copy, p.to(dtype)) for p, copy in copies.items())
    assert [copy.data_ptr() for copy in copies.values()] == addresses
    optimizer.keep_copies({})
    give_gradients(params, params, 3)
    optimizer.step()
    assert not torch.equal(copies[params[3]], params[3].to(dtype))


def test_copies_of_parameters_that_moved_are_still_right() -> None:
    p = Parameter(values(1, shape=(8, 6)))
    copy = torch.empty_like(p, dtype=torch.bfloat16, requires_grad=False)
    optimizer = CPUAdam([p])
    optimizer.keep_copies({p: copy})
    p.data = p.data.t().contiguous().t()
    p.grad = values(2, shape=(8, 6))
    optimizer.step()
    assert torch.equal(copy, p.to(torch.bfloat16))


def test_not_a_number_stays_where_it_is() -> None:
    for dtype in DTYPES:
        p = Parameter(torch.ones(70, dtype=dtype))
        p.grad = torch.ones(70, dtype=dtype)
        p.grad[[3, 66]] = math.nan
        CPUAdam([p], exp_avg_dtype=torch.bfloat16).step()
        assert torch.isnan(p).nonzero().flatten().tolist() == [3, 66]


def test_an_infinite_parameter_does_not_spoil_the_moments() -> None:
    p = Parameter(torch.tensor([math.inf, 1.0]))
    p.grad = torch.ones(2)
    optimizer = CPUAdam([p])
    optimizer.step()
    assert torch.isfinite(optimizer.state[p]["exp_avg"]).all()


def test_works_under_gradscaler_of_the_cpu() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, torchs = CPUAdam(ours), torch.optim.AdamW(theirs)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for step in range(4):
        for params, its, scaler in ((ours, optimizer, scalers[0]), (theirs, torchs, scalers[1])):
            its.zero_grad()
            loss = sum((p * values(5, i, step, shape=tuple(p.shape))).sum() for i, p in enumerate(params))
            scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
            scaler.step(its)
            scaler.update()
    assert_close(ours, theirs, (optimizer, torchs), 1e-3)
