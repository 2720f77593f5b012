"""A state of CPUAdam goes to torch's AdamW and back, and states of DeepSpeed's and apex's optimizers are taken."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.compress import InputError
from onebit.optim import CPUAdam
from tests.optim.samples import parameters, values

Optimizer = torch.optim.Optimizer


def train(optimizer: Optimizer, params: list[Parameter], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            g = values(3, i, step, shape=tuple(p.shape))
            # torch's fused kernel reads a gradient in the memory order of its parameter, whatever its own is
            p.grad = None if i == 3 and step % 2 else torch.empty_like(p).copy_(g)
        optimizer.step()


def assert_same(ours: list[Parameter], theirs: list[Parameter], exact: bool = False) -> None:
    """To the rounding of some steps of fp32, or bit for bit."""
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)


def switch(first: Callable[[list[Parameter]], Optimizer], second: Callable[[list[Parameter]], Optimizer]) -> None:
    """Five steps with one optimizer and five with another that has its state are ten steps of torch's AdamW."""
    params, reference = parameters(), parameters()
    train(torch.optim.AdamW(reference, lr=0.01, weight_decay=0.1), reference, range(10))
    one = first(params)
    train(one, params, range(5))
    other = second(params)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    train(other, params, range(5, 10))
    assert_same(params, reference)


def test_torchs_state_goes_on_here() -> None:
    switch(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), CPUAdam)


def test_torchs_fused_state_goes_on_here() -> None:
    switch(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True), CPUAdam)


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_a_state_of_ours_goes_on_in_torch(how: dict[str, bool]) -> None:
    switch(lambda p: CPUAdam(p, lr=0.01, weight_decay=0.1), lambda p: torch.optim.AdamW(p, **how))


@pytest.mark.parametrize("decoupled", [True, False])
def test_a_state_tells_torchs_adam_and_ours_how_weight_decays(decoupled: bool) -> None:
    params = parameters()
    ours = CPUAdam(params, adamw_mode=decoupled)
    torchs = torch.optim.Adam(params)
    torchs.load_state_dict(ours.state_dict())
    assert torchs.param_groups[0]["decoupled_weight_decay"] is decoupled
    back = CPUAdam(params, adamw_mode=not decoupled)
    back.load_state_dict(torchs.state_dict())
    assert back.param_groups[0]["adamw_mode"] is decoupled
    assert "decoupled_weight_decay" not in back.param_groups[0]
    assert "foreach" not in back.param_groups[0]


def test_a_state_from_before_torch_told_them_apart_keeps_the_mode() -> None:
    params = parameters()
    old = torch.optim.Adam(params).state_dict()
    del old["param_groups"][0]["decoupled_weight_decay"]
    optimizer = CPUAdam(params, adamw_mode=True)
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["adamw_mode"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_resume_through_a_file_is_exact_whatever_the_dtype(dtype: torch.dtype) -> None:
    """Torch would cast fp32 moments of a bf16 parameter to bf16."""
    params, reference = parameters(dtype=dtype), parameters(dtype=dtype)
    whole = CPUAdam(reference, lr=0.01, exp_avg_dtype=torch.bfloat16)
    train(whole, reference, range(8))
    first = CPUAdam(params, lr=0.01, exp_avg_dtype=torch.bfloat16)
    train(first, params, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = CPUAdam(params, exp_avg_dtype=torch.bfloat16)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(second, params, range(4, 8))
    assert_same(params, reference, exact=True)
    assert second.param_groups[0]["lr"] == 0.01


def test_moments_take_the_dtype_that_the_optimizer_was_made_with() -> None:
    params = parameters()
    first = CPUAdam(params)
    train(first, params, range(2))
    second = CPUAdam(params, exp_avg_sq_dtype=torch.bfloat16)
    second.load_state_dict(first.state_dict())
    for p in params:
        assert second.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(second.state[p]["exp_avg_sq"], first.state[p]["exp_avg_sq"].bfloat16())


def test_two_optimizers_share_no_state_after_a_load() -> None:
    params = parameters()
    first, second = CPUAdam(params), CPUAdam(params)
    train(first, params, range(2))
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict()["state"])
    train(second, params, range(2, 4))
    for index, state in first.state_dict()["state"].items():
        assert all(torch.equal(state[key], before[index][key]) for key in state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_goes_on(copied: Callable[[Any], Any]) -> None:
    params, reference = parameters(), parameters()
    train(CPUAdam(reference), reference, range(6))
    first = CPUAdam(params)
    first.keep_copies({params[0]: torch.empty_like(params[0], dtype=torch.bfloat16, requires_grad=False)})
    train(first, params, range(3))
    second = copied(first)
    theirs = second.param_groups[0]["params"]
    train(second, theirs, range(3, 6))
    assert_same(theirs, reference, exact=True)


def test_hooks_of_the_user_see_the_state_as_with_torch() -> None:
    params = parameters(dtype=torch.bfloat16)
    first, second = CPUAdam(params), CPUAdam(params)
    train(first, params, range(2))
    seen: list[str] = []

    def before(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("before")
        return {**given, "state": {0: given["state"][0]}}

    def after(optimizer: Optimizer) -> None:
        seen.append("after")
        assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32

    second.register_load_state_dict_pre_hook(before)
    second.register_load_state_dict_post_hook(after)
    second.load_state_dict(first.state_dict())
    assert seen == ["before", "after"]
    assert list(second.state) == params[:1]


def deepspeed_cpu(state: list[dict[str, Tensor]]) -> dict[str, Any]:
    """DeepSpeedCPUAdam.state_dict(): the count of steps is an int per parameter."""
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}
    entries = {i: {**s, "step": int(s["step"])} for i, s in enumerate(state)}
    return {"state": entries, "param_groups": [{**group, "amsgrad": False, "params": [*range(len(state))]}]}


def apex_fused(state: list[dict[str, Tensor]], step: object) -> dict[str, Any]:
    """FusedAdam of apex, and of DeepSpeed before it counted per parameter: the group counts for all."""
    saved = deepspeed_cpu(state)
    saved["param_groups"][0]["step"] = step
    for entry in saved["state"].values():
        del entry["step"]
    return saved


@pytest.mark.parametrize("layout", ["DeepSpeedCPUAdam", "apex", "apex, capturable", "float step"])
def test_states_of_deepspeed_and_apex_go_on(layout: str) -> None:
    params, reference = parameters()[:3], parameters()[:3]
    torchs = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
    train(torchs, params, range(4))
    state = copy.deepcopy([torchs.state[p] for p in params])
    saved = deepspeed_cpu(state)
    if layout.startswith("apex"):
        saved = apex_fused(state, torch.tensor([4], dtype=torch.int32) if "capturable" in layout else 4)
    elif layout == "float step":
        saved["state"][0]["step"] = 4.0
    optimizer = CPUAdam(params)
    optimizer.load_state_dict(saved)
    assert [float(optimizer.state[p]["step"]) for p in params] == [4.0] * 3
    assert "step" not in optimizer.param_groups[0]
    train(optimizer, params, range(4, 8))
    train(torch.optim.AdamW(reference, lr=0.01, weight_decay=0.1), reference, range(8))
    assert_same(params, reference)


def test_what_it_has_no_use_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    optimizer = CPUAdam(params)
    train(optimizer, params, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["worker_error"] = torch.zeros(3)
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(saved)
    assert "worker_error" in caplog.text
    assert "worker_error" not in optimizer.state[params[0]]


def wrong_shape(saved: dict[str, Any]) -> None:
    saved["state"][3]["exp_avg_sq"] = torch.zeros(7)


def flat_partition(saved: dict[str, Any]) -> None:
    saved["single_partition_of_fp32_groups"] = saved.pop("state")


def fewer_parameters(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def another_group(saved: dict[str, Any]) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


def amsgrad(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["amsgrad"] = True


def maximum(saved: dict[str, Any]) -> None:
    saved["state"][3]["max_exp_avg_sq"] = saved["state"][3]["exp_avg_sq"]


def no_step(saved: dict[str, Any]) -> None:
    del saved["state"][3]["step"]


def negative_step(saved: dict[str, Any]) -> None:
    saved["state"][3]["step"] = torch.tensor(-1.0)


def no_moment(saved: dict[str, Any]) -> None:
    del saved["state"][3]["exp_avg"]


def integers(saved: dict[str, Any]) -> None:
    saved["state"][3]["exp_avg"] = saved["state"][3]["exp_avg"].int()


def not_a_number(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["lr"] = float("nan")


CASES = {
    wrong_shape: r"parameter 3: expected 'exp_avg_sq' of shape \(131,\).*got float32 \(7,\)",
    flat_partition: "expected {'state'.*DeepSpeed's own tools",
    fewer_parameters: r"expected groups of \[7\] parameters, got groups of \[6\]",
    another_group: r"got groups of \[7, 0\]",
    amsgrad: "saved with amsgrad=True",
    maximum: "parameter 3 was saved with amsgrad=True",
    no_step: "parameter 3: expected a step count.*None",
    negative_step: "parameter 3: expected a step count.*-1.0",
    no_moment: "parameter 3 has no tensor 'exp_avg'",
    integers: "parameter 3: expected 'exp_avg'.*floating point",
    not_a_number: "lr must be a number.*nan",
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda x: x.__name__)
def test_a_state_that_does_not_fit_changes_nothing(spoil: Callable[[dict[str, Any]], None]) -> None:
    params = parameters()
    optimizer = CPUAdam(params, lr=0.5)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.25
    spoil(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InputError, match=CASES[spoil]):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(state[key], after["state"][index][key]) for key in state)
    train(optimizer, params, range(3, 4))  # and no hook is left behind
    optimizer.load_state_dict(before)
