"""What FusedAdam promises wherever its kernels run: tests to inherit from, with fixtures that say where that is."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebit.compress import InputError
from onebit.optim import FusedAdam
from tests.optim.adam_inputs import torch_inputs

SHAPES = [(3000,), (5, 7), (), (0,), (1,), (4097,), (64, 32), (1031,)]
HALVES = [torch.bfloat16, torch.float16]
REFUSED = ("amsgrad",)
LR, STEPS = 1e-3, 100

Make = Callable[..., FusedAdam]


def parameters(shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def twins(params: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [p.detach().clone().to(dtype or p.dtype).requires_grad_() for p in params]


def set_gradients(seed: int, *lists: Sequence[Tensor], missing: float = 0.0) -> None:
    """The same gradients for each list of parameters, rounded as those of the first; each may be missing."""
    generator = torch.Generator().manual_seed(seed)
    for row in zip(*lists, strict=True):
        g = torch.randn(row[0].shape, generator=generator).to(row[0].dtype)
        absent = torch.rand((), generator=generator).item() < missing
        for p in row:
            p.grad = None if absent else g.to(p.device, p.dtype, copy=True)


def assert_near(ours: Tensor, theirs: Tensor, moved: float, where: str, unit: float = 1e-6) -> None:
    """To `unit` of itself and of how far it has moved at most: a number near 0 keeps the rounding of larger ones."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    error = (ours - theirs).abs() / (theirs.abs() + moved)
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= unit, (
        f"{where}: worst error {worst:.3g} > {unit:g} at {int(error.argmax())} of {tuple(ours.shape)}: "
        f"{ours.flatten()[error.argmax()]:.9g} for {theirs.flatten()[error.argmax()]:.9g}"
    )


def assert_same_state(ours: FusedAdam, a: Tensor, theirs: Any, b: Tensor, where: str) -> None:
    mine, other = ours.state[a], theirs.state[b]
    assert float(mine["step"]) == float(other["step"]), where
    for key in ("exp_avg", "exp_avg_sq"):
        assert_near(mine[key], other[key], 1.0, f"{where}, {key}")  # gradients are of size 1


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def everything(optimizer: FusedAdam) -> list[bytes]:
    """The bits of all parameters, gradients and states."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in params for _, t in sorted(optimizer.state.get(p, {}).items())]
    return bits([*params, *states])


def table_inputs() -> list[Any]:
    """Torch's own table of option combinations, as AdamW and as Adam."""
    try:
        inputs = torch_inputs()
    except ImportError as error:
        return [pytest.param(True, {}, marks=pytest.mark.skip(reason=f"torch's table cannot be had: {error}"))]
    cases = [(decoupled, case) for decoupled in (True, False) for case in inputs]
    return [pytest.param(d, case.kwargs, id=f"{'AdamW' if d else 'Adam'}, {case.desc}") for d, case in cases]


class FusedAdamSuite:
    """Needs the fixtures `device`, where parameters are made, and `make`, which is FusedAdam or a subclass."""

    @pytest.mark.parametrize(("decoupled", "options"), table_inputs())
    def test_100_steps_of_torchs_own_option_table(
        self, make: Make, device: str, decoupled: bool, options: dict[str, Any]
    ) -> None:
        params = parameters(SHAPES, device)
        if any(options.get(name) for name in REFUSED):
            with pytest.raises(InputError, match="amsgrad"):
                make(params, adam_w_mode=decoupled, **options)
            return
        theirs = twins(params)
        options = {"weight_decay": 1e-2 if decoupled else 0.0, **options}
        # Where it is capturable, torch computes bias corrections in fp32, which is further from the truth than from us.
        plain = {name: value for name, value in options.items() if name != "capturable"}
        optimizer = make(params, adam_w_mode=decoupled, **options)
        reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **plain)
        for step in range(STEPS):
            set_gradients(step, params, theirs)
            optimizer.step()
            reference.step()
        moved = float(optimizer.param_groups[0]["lr"]) * STEPS
        for i, (p, q) in enumerate(zip(params, theirs, strict=True)):
            assert_near(p, q, moved, f"parameter {i}")
            assert_same_state(optimizer, p, reference, q, f"parameter {i}")

    def test_missing_gradients_make_no_step_and_steps_are_counted_for_each_parameter(
        self, make: Make, device: str
    ) -> None:
        params = parameters(SHAPES, device)
        theirs = twins(params)
        optimizer, reference = make(params), torch.optim.AdamW(theirs)
        for step in range(30):
            set_gradients(step, params, theirs, missing=0.5)
            optimizer.step()
            reference.step()
        counts = {float(optimizer.state[p]["step"]) for p in params}
        assert len(counts) > 2
        for i, (p, q) in enumerate(zip(params, theirs, strict=True)):
            assert_near(p, q, LR * STEPS, f"parameter {i}")
            assert_same_state(optimizer, p, reference, q, f"parameter {i}")

    def test_a_parameter_that_never_had_a_gradient_has_no_state(self, make: Make, device: str) -> None:
        params = parameters([(10,), (20,)], device)
        params[0].grad = torch.ones_like(params[0])
        optimizer = make(params)
        optimizer.step()
        assert set(optimizer.state) == {params[0]}
        params[1].grad = torch.ones_like(params[1])
        optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in params] == [2, 1]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_shape_memory_order_and_dtype(self, make: Make, device: str, data: st.DataObject) -> None:
        shape = data.draw(st.lists(st.integers(0, 9), max_size=4).map(tuple), "shape")
        orders = st.sampled_from(["contiguous", "permuted", "gaps", "unaligned"])
        arranged = [data.draw(orders, what) for what in ("order of the parameter", "of the gradient")]
        dtypes = [data.draw(st.sampled_from([torch.float32, *HALVES]), what) for what in ("its dtype", "the other's")]
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
        zero = data.draw(st.booleans(), "zero_gradients")

        values = torch.randn(shape, generator=generator).to(dtypes[0])
        p = arrange(values, arranged[0], device).requires_grad_()
        expected = values.float().clone().requires_grad_()
        optimizer = make([p], lr=0.1, zero_gradients=zero)
        reference = torch.optim.AdamW([expected], lr=0.1)
        for _ in range(3):
            g = torch.randn(shape, generator=generator).to(dtypes[1])
            p.grad = None
            with_dtype(p, dtypes[1])
            p.grad = arrange(g, arranged[1], device)
            expected.grad = g.float().clone()
            optimizer.step()
            reference.step()
            expected.data = expected.data.to(dtypes[0]).float()
            assert p.grad.count_nonzero() == (0 if zero else g.count_nonzero())
        # A number may round to the other neighbour in each of three steps.
        unit = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtypes[0]]
        assert_near(p, expected, 0.3, f"{shape} {arranged} {dtypes}", unit)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_reduced_parameters_are_those_of_fp32_arithmetic_rounded_every_step(
        self, make: Make, device: str, dtype: torch.dtype
    ) -> None:
        params = parameters(SHAPES, device, dtype)
        exact = twins(params, torch.float32)
        optimizer, reference = make(params, lr=0.01), torch.optim.AdamW(exact, lr=0.01)
        for step in range(10):
            set_gradients(step, params, exact)
            optimizer.step()
            reference.step()
            for p, q in zip(params, exact, strict=True):
                # Where fp32 results differ in the last bit, a few may round to other neighbours; then both go on alike.
                rounded = q.detach().to(dtype)
                assert (p.detach() != rounded).sum() <= 1 + p.numel() // 500, f"step {step}"
                assert_near(p, rounded, 1e-3, f"step {step}", unit=2 * torch.finfo(dtype).eps)
                q.data = p.detach().float()

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_master_weights_are_fp32_training_that_the_parameters_are_rounded_from(
        self, make: Make, device: str, dtype: torch.dtype
    ) -> None:
        params = parameters(SHAPES, device, dtype)
        exact = twins(params, torch.float32)
        optimizer, reference = make(params, master_weights=True), torch.optim.AdamW(exact)
        for step in range(50):
            set_gradients(step, params, exact)
            optimizer.step()
            reference.step()
        for i, (p, q) in enumerate(zip(params, exact, strict=True)):
            master = optimizer.state[p]["master"]
            assert master.dtype == torch.float32
            assert_near(master, q, LR * STEPS, f"parameter {i}")
            assert torch.equal(p, master.to(dtype)), f"parameter {i}"

    @pytest.mark.parametrize("options", [{"bias_correction": False}, {"bias_correction": False, "adam_w_mode": False}])
    def test_without_bias_correction_a_step_is_as_after_infinitely_many(
        self, make: Make, device: str, options: dict[str, Any]
    ) -> None:
        params = parameters([(1000,)], device)
        exact = params[0].detach().double().cpu().numpy()
        m = v = np.zeros_like(exact)
        optimizer = make(params, weight_decay=0.1, **options)
        for step in range(20):
            set_gradients(step, params)
            assert params[0].grad is not None
            g = params[0].grad.double().cpu().numpy()
            if options.get("adam_w_mode", True):
                exact = exact * (1 - LR * 0.1)
            else:
                g = g + 0.1 * exact
            optimizer.step()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            exact = exact - LR * m / (np.sqrt(v) + 1e-8)
        # Steps are 1 / sqrt(1 - 0.999) = 32 times as large as with the correction.
        assert_near(params[0], torch.from_numpy(exact), 32 * LR * 20, "parameter", 2e-6)
        assert float(optimizer.state[params[0]]["step"]) == 20

    @pytest.mark.parametrize("master", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_step_that_found_an_inf_changes_nothing(
        self, make: Make, device: str, dtype: torch.dtype, master: bool
    ) -> None:
        params = parameters(SHAPES, device, dtype)
        optimizer = make(params, master_weights=master)
        set_gradients(0, params)
        optimizer.step()
        set_gradients(1, params)
        assert params[0].grad is not None
        params[0].grad[3] = torch.inf
        before = everything(optimizer)
        optimizer.found_inf, optimizer.grad_scale = torch.ones(1, device=device), torch.full((1,), 8.0, device=device)
        optimizer.step()
        assert everything(optimizer) == before
        optimizer.found_inf = torch.zeros(1, device=device)
        set_gradients(2, params)
        optimizer.step()
        assert {float(optimizer.state[p]["step"]) for p in params} == {2.0}

    def test_gradients_are_unscaled_on_the_way(self, make: Make, device: str) -> None:
        params = parameters(SHAPES, device)
        theirs = twins(params)
        optimizer, reference = make(params), make(theirs)
        optimizer.grad_scale = torch.full((), 1024.0, device=device)
        optimizer.found_inf = torch.zeros((), device=device)
        for step in range(5):
            set_gradients(step, params, theirs)
            for p in params:
                assert p.grad is not None
                p.grad *= 1024
            optimizer.step()
            reference.step()
        assert bits(params) == bits(theirs)  # a power of two divides without rounding

    def test_a_grad_scaler_backs_off_and_goes_on(self, make: Make, device: str) -> None:
        params = parameters([(100,), (7, 3)], device)
        optimizer = make(params)
        scaler = torch.amp.GradScaler(device.partition(":")[0], init_scale=4.0)
        for poison in (1.0, torch.inf, 1.0):
            before = bits(params)
            optimizer.zero_grad()
            scaler.scale(sum((p * p).sum() for p in params) * poison).backward()
            scaler.step(optimizer)
            scaler.update()
            assert (bits(params) == before) == (poison != 1.0)
        assert scaler.get_scale() == 2.0
        assert {float(optimizer.state[p]["step"]) for p in params} == {2.0}

    @pytest.mark.parametrize("inf", [0.0, 1.0])
    def test_gradients_are_zeroed_in_the_pass_also_where_the_step_is_not_made(
        self, make: Make, device: str, inf: float
    ) -> None:
        params = parameters(SHAPES, device)
        theirs = twins(params)
        optimizer, reference = make(params, zero_gradients=True), make(theirs)
        for o in (optimizer, reference):
            o.found_inf = torch.full((), inf, device=device)
        for step in range(3):
            set_gradients(step, params, theirs)
            optimizer.step()
            reference.step()
            assert all(p.grad is not None and not p.grad.any() for p in params)
        assert bits(params) == bits(theirs)

    def test_groups_have_options_of_their_own(self, make: Make, device: str) -> None:
        params = parameters(SHAPES, device)
        theirs = twins(params)

        def groups(of: list[Tensor]) -> list[dict[str, Any]]:
            return [
                {"params": of[:3], "lr": 1e-2, "betas": (0.8, 0.95)},
                {"params": of[3:6], "weight_decay": 0.3, "eps": 1e-3},
                {"params": of[6:], "maximize": True},
            ]

        optimizer, reference = make(groups(params)), torch.optim.AdamW(groups(theirs))
        schedules = [torch.optim.lr_scheduler.StepLR(o, 7, 0.5) for o in (optimizer, reference)]
        for step in range(30):
            set_gradients(step, params, theirs)
            optimizer.step()
            reference.step()
            for schedule in schedules:
                schedule.step()
        for i, (p, q) in enumerate(zip(params, theirs, strict=True)):
            assert_near(p, q, 10 * LR * 30, f"parameter {i}")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_a_learning_rate_on_the_device_is_read_at_every_step(
        self, make: Make, device: str, dtype: torch.dtype
    ) -> None:
        params = parameters([(500,)], device)
        theirs = twins(params)
        lr = torch.tensor(2.0**-10, dtype=dtype, device=device)
        optimizer, reference = make(params, lr=lr), make(theirs, lr=2.0**-10)
        for step in range(4):
            set_gradients(step, params, theirs)
            optimizer.step()
            reference.step()
            lr.mul_(0.5)
            reference.param_groups[0]["lr"] *= 0.5
        assert bits(params) == bits(theirs)

    def test_parameters_gradients_and_states_may_move_between_steps(self, make: Make, device: str) -> None:
        params = parameters(SHAPES, device)
        theirs = twins(params)
        optimizer, reference = make(params), torch.optim.AdamW(theirs)
        kept: list[Any] = []  # so that nothing new lies where something old lay
        for step in range(8):
            set_gradients(step, params, theirs)
            if step == 2:
                kept += [p.data for p in params]
                for p in params:
                    p.data = p.data.clone()
            if step == 3:
                state = optimizer.state[params[0]]
                kept.append(state["exp_avg"])
                state["exp_avg"] = state["exp_avg"].clone()
            if step == 4:  # starting anew
                for o, of in ((optimizer, params), (reference, theirs)):
                    o.state[of[5]] = {}
            if step == 5:
                optimizer.state.clear()
                reference.state.clear()
            if step == 7:  # the moments were elsewhere in the meantime, as a whole
                kept += [s[key].data for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
                for key in ("exp_avg", "exp_avg_sq"):
                    for s in optimizer.state.values():
                        s[key].data = s[key].data.clone()
            kept += [p.grad for p in params]
            optimizer.step()
            reference.step()
        for i, (p, q) in enumerate(zip(params, theirs, strict=True)):
            assert_near(p, q, LR * STEPS, f"parameter {i}")

    def test_a_parameter_may_be_exchanged_with_its_state(self, make: Make, device: str) -> None:
        params = parameters([(40,), (50,)], device)
        theirs = twins(params)
        optimizer, reference = make(params), torch.optim.AdamW(theirs)
        set_gradients(0, params, theirs)
        optimizer.step()
        reference.step()
        longer = torch.ones(60, device=device)
        for o, of in ((optimizer, params), (reference, theirs)):
            state = o.state.pop(of[0])
            of[0] = torch.cat([of[0].detach(), longer]).requires_grad_()
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.cat([state[key], 0 * longer])
            o.state[of[0]] = state
            o.param_groups[0]["params"][0] = of[0]
        set_gradients(1, params, theirs)
        optimizer.step()
        reference.step()
        for i, (p, q) in enumerate(zip(params, theirs, strict=True)):
            assert_near(p, q, LR, f"parameter {i}")

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
    def test_a_copy_goes_on_alone(self, make: Make, device: str, copied: Callable[[FusedAdam], FusedAdam]) -> None:
        params = parameters(SHAPES, device)
        optimizer = make(params)
        set_gradients(0, params)
        optimizer.step()
        other = copied(optimizer)
        before = everything(optimizer)
        twin_params = [p for group in other.param_groups for p in group["params"]]
        set_gradients(1, twin_params)
        other.step()
        assert everything(optimizer) == before
        set_gradients(1, params)
        optimizer.step()
        assert everything(optimizer) == everything(other)

    def test_states_go_to_torch_and_come_from_torch(self, make: Make, device: str) -> None:
        params = parameters(SHAPES, device)
        theirs = twins(params)
        optimizer, reference = make(params, lr=0.01), torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.3)
        for step in range(3):
            set_gradients(step, params, theirs)
            optimizer.step()
            reference.step()
        back = twins(params), twins(theirs)
        taken = torch.optim.AdamW(back[0]), make(back[1])
        taken[0].load_state_dict(copy.deepcopy(optimizer.state_dict()))
        taken[1].load_state_dict(copy.deepcopy(reference.state_dict()))
        for step in range(3, 6):
            set_gradients(step, params, theirs, *back)
            for o in (optimizer, reference, *taken):
                o.step()
        for i, (p, q) in enumerate(zip([*params, *theirs], [*back[0], *back[1]], strict=True)):
            assert_near(p, q, 0.01 * STEPS, f"parameter {i}")

    def test_a_state_of_apex_is_taken_with_the_step_of_its_group(self, make: Make, device: str) -> None:
        params = parameters([(30,), (4, 5)], device)
        theirs = twins(params)
        reference = torch.optim.AdamW(theirs)
        for step in range(3):
            set_gradients(step, theirs)
            reference.step()
        saved = copy.deepcopy(reference.state_dict())
        for entry in saved["state"].values():
            del entry["step"]
        options = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "bias_correction": True}
        saved["param_groups"] = [{**options, "step": 3, "params": [0, 1]}]
        others = twins(theirs)
        optimizer = make(others)
        optimizer.load_state_dict(saved)
        set_gradients(3, theirs, others)
        optimizer.step()
        reference.step()
        for i, (p, q) in enumerate(zip(others, theirs, strict=True)):
            assert_near(p, q, LR, f"parameter {i}")
            assert_same_state(optimizer, p, reference, q, f"parameter {i}")

    def test_a_loaded_state_goes_on_bit_for_bit(self, make: Make, device: str) -> None:
        params = parameters(SHAPES, device, torch.bfloat16)
        optimizer = make(params, master_weights=True)
        for step in range(3):
            set_gradients(step, params, missing=0.3)
            optimizer.step()
        others = twins(params)
        other = make(others, master_weights=True)
        other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        for step in range(3, 6):
            set_gradients(step, params, others)
            optimizer.step()
            other.step()
        assert everything(optimizer) == everything(other)

    @pytest.mark.parametrize("bad", ["sparse", "float64 gradient", "nan lr", "negative eps", "float64 parameter"])
    def test_what_cannot_be_used_is_refused_before_anything_changes(self, make: Make, device: str, bad: str) -> None:
        params = parameters([(10,), (20, 2)], device)
        optimizer = make(params)
        set_gradients(0, params)
        optimizer.step()
        before = everything(optimizer)
        set_gradients(1, params)
        if bad == "sparse":
            assert params[1].grad is not None
            params[1].grad = params[1].grad.to_sparse()
        if bad == "float64 gradient":
            params[1].grad = None
            with_dtype(params[1], torch.float64)
            params[1].grad = torch.ones_like(params[1], dtype=torch.float64)
        if bad == "nan lr":
            optimizer.param_groups[0]["lr"] = float("nan")
        if bad == "negative eps":
            optimizer.param_groups[0]["eps"] = -1.0
        if bad == "float64 parameter":
            params[1].grad = None
            params[1].data = params[1].data.double()
            params[1].grad = torch.ones_like(params[1])
            before = everything(optimizer)
        with pytest.raises(InputError):
            optimizer.step()
        assert everything(optimizer) == before

    def test_no_gradient_and_no_moment_is_kept_that_nobody_else_keeps(self, make: Make, device: str) -> None:
        params = parameters(SHAPES, device, torch.bfloat16)
        optimizer = make(params, master_weights=True)
        for step in range(2):
            set_gradients(step, params)
            optimizer.step()
        watched = [weakref.ref(p.grad) for p in params]
        for p in params:
            p.grad = None
        for state in optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq", "master"):
                watched.append(weakref.ref(state[key]))
                state[key] = state[key].clone()  # as to another device
        assert all(of() is None for of in watched)

    def test_autograd_sees_that_a_parameter_has_changed(self, make: Make, device: str) -> None:
        params = parameters([(10,)], device)
        optimizer = make(params)
        loss = (params[0] * params[0]).sum()
        set_gradients(0, params)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_a_closure_is_called_with_gradients_and_its_loss_returned(self, make: Make, device: str) -> None:
        params = parameters([(10,)], device)
        optimizer = make(params)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (params[0] ** 2).sum()
            loss.backward()
            return loss

        first = optimizer.step(closure)
        assert closure().item() < first.item()


def arrange(values: Tensor, order: str, device: str) -> Tensor:
    """The same values with another memory layout."""
    values = values.to(device, copy=True)
    if order == "permuted" and values.ndim > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if order == "gaps" and values.ndim:
        return torch.stack([values, values], dim=-1)[..., 0]
    if order == "unaligned":
        memory = torch.empty(values.numel() + 1, dtype=values.dtype, device=device)
        return memory[1:].view(values.shape).copy_(values)
    return values


def with_dtype(p: Tensor, dtype: torch.dtype) -> None:
    """Let a parameter's gradient have another dtype; older releases of torch never do."""
    if p.dtype != dtype:
        if not hasattr(p, "grad_dtype"):
            pytest.skip("this release of torch has no gradients of another dtype than their parameter's")
        p.grad_dtype = dtype
