"""Groups of one optimizer: options of their own, compress=False, mixed dtypes, and devices that cannot go together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW

from onebit.comm import Backend, InputError, MismatchError, run_threads
from onebit.comm.threads_backend import ThreadsBackend
from onebit.optim import OnebitAdam
from tests.comm.samples import bits
from tests.optim.samples import contents, feedback, gradients, mean_of, parameters, step, through_a_file, values


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_dense_group_is_adamw_for_ever_beside_one_that_is_compressed(world_size: int) -> None:
    def train(backend: Backend) -> None:
        params, copies, alone = parameters(), parameters(), parameters()
        groups = [{"params": params[:3]}, {"params": params[3:], "compress": False, "lr": 0.1}]
        optimizer = OnebitAdam(groups, freeze_step=4, lr=1e-2, backend=backend)
        adamw = AdamW(copies[3:], lr=0.1)
        compressed = OnebitAdam(alone[:3], freeze_step=4, lr=1e-2, backend=backend)
        for number in range(14):
            assert [optimizer.phase(g) for g in range(2)] == ["warmup" if number < 4 else "compressed", "dense"]
            step(optimizer, gradients(params, backend.rank, number))
            step(adamw, mean_of([gradients(params, rank, number) for rank in range(world_size)])[3:])
            step(compressed, gradients(params, backend.rank, number)[:3])
            assert bits(params[3:]) == bits(copies[3:])
            assert contents(optimizer, params[:3]) == contents(compressed)
            for p, copy in zip(params[3:], copies[3:], strict=True):
                for key, value in adamw.state[copy].items():
                    assert bits(optimizer.state[p][key]) == bits(value)

    run_threads(world_size, train)


def test_a_dense_group_goes_on_after_a_save_and_holds_no_error_feedback() -> None:
    def make(backend: Backend) -> tuple[OnebitAdam, list[Parameter]]:
        params = parameters()
        groups = [{"params": params[:3], "compress": False}, {"params": params[3:]}]
        return OnebitAdam(groups, freeze_step=2, lr=1e-2, backend=backend), params

    def train(backend: Backend) -> None:
        optimizer, params = make(backend)
        for number in range(5):
            step(optimizer, gradients(params, backend.rank, number))
        checkpoint = through_a_file({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
        assert "worker" not in checkpoint["optimizer"]["onebit"]["residuals"][0]
        step(optimizer, gradients(params, backend.rank, 5))
        resumed, copies = make(backend)
        with torch.no_grad():
            for p, value in zip(copies, checkpoint["params"], strict=True):
                p.copy_(value)
        resumed.load_state_dict(checkpoint["optimizer"])
        assert resumed.phase(0) == "dense"
        step(resumed, gradients(copies, backend.rank, 5))
        assert (contents(resumed), feedback(resumed)) == (contents(optimizer), feedback(optimizer))

    run_threads(2, train)


def test_switching_compression_off_for_a_group_makes_its_next_step_dense() -> None:
    def train(backend: Backend) -> list[tuple[str, int]]:
        params = [Parameter(torch.zeros(4096))]
        optimizer = OnebitAdam(params, freeze_step=2, backend=backend)
        seen: list[tuple[str, int]] = []
        for number in range(6):
            optimizer.param_groups[0]["compress"] = number < 4
            before = optimizer.stats.wire_bytes
            phase = optimizer.phase()
            step(optimizer, gradients(params, backend.rank, number))
            seen.append((phase, optimizer.stats.wire_bytes - before))
        return seen

    dense, small = 4 * (4096 + 2), 2 * (4096 // 2 // 8 + 16)
    expected = [("warmup", dense)] * 2 + [("compressed", small)] * 2 + [("dense", dense)] * 2
    assert run_threads(2, train) == [expected] * 2


@pytest.mark.parametrize("bias_correction", [True, False])
def test_dense_steps_after_a_freeze_correct_the_variance_for_the_steps_that_it_has_seen(bias_correction: bool) -> None:
    beta1, beta2, lr, eps = 0.9, 0.99, 1e-2, 1e-8
    p = Parameter(values(0, shape=(50,)))
    options: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": 0.1, "freeze_step": 3}
    optimizer = OnebitAdam([p], backend="single", bias_correction=bias_correction, **options)
    x, m, v, age = p.detach().double().numpy().copy(), np.zeros(50), np.zeros(50), 0
    for number in range(30):
        optimizer.param_groups[0]["compress"] = number < 20
        g = values(1, number, shape=(50,))
        step(optimizer, [g])
        m = beta1 * m + (1 - beta1) * g.double().numpy()
        if number < 3 or number >= 20:
            v = beta2 * v + (1 - beta2) * g.double().numpy() ** 2
            age += 1
        rate, root = (1 / (1 - beta1 ** (number + 1)), 1 - beta2**age) if bias_correction else (1.0, 1.0)
        x = x - 0.1 * lr * x - lr * rate * m / (np.sqrt(v / root) + eps)
    # 30 steps of some ten roundings of numbers about 1; the wrong count would move them by percents of 30·lr.
    np.testing.assert_allclose(p.detach().numpy(), x, atol=30 * 10 * 2.0**-24)
    assert float(optimizer.state[p]["variance_step"]) == age


def test_a_group_that_was_dense_for_a_while_compresses_what_is_alive_then() -> None:
    def train(backend: Backend) -> list[Any]:
        params = [Parameter(torch.zeros(3000)), Parameter(torch.zeros(20))]
        optimizer = OnebitAdam(params, freeze_step=2, lr=1e-2, weight_decay=0.0, backend=backend)
        for number in range(12):
            optimizer.param_groups[0]["compress"] = number not in (5, 6)
            given = gradients(params, backend.rank, number)
            if number < 5:  # half of one parameter is dead at the freeze, and the other has no variance at all
                assert given[0] is not None
                given[0][:1500] = 0.0
                given[1] = None
            step(optimizer, given)
            moved = [bool((params[0][:1500] != 0).all()), bool((params[1] != 0).all())]
            assert moved == [number >= 5] * 2
        before = params[0].detach().clone()
        step(optimizer, gradients(params, backend.rank, 12))
        assert bool((params[0] != before).all())
        return contents(optimizer)

    first, second = run_threads(2, train)
    assert first == second


@pytest.mark.parametrize("world_size", [1, 2])
def test_dtypes_of_one_group_do_not_matter_to_each_other(world_size: int) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16]

    def train(backend: Backend) -> None:
        mixed = [Parameter(p.detach().to(dtypes[i % 3])) for i, p in enumerate(parameters())]
        copies = [Parameter(p.detach().clone()) for p in mixed]
        together = OnebitAdam(mixed, freeze_step=3, variance_refresh=2, lr=1e-2, backend=backend)
        apart = [OnebitAdam([p], freeze_step=3, variance_refresh=2, lr=1e-2, backend=backend) for p in copies]
        for number in range(8):
            given = gradients(mixed, backend.rank, number)
            step(together, given)
            for optimizer, g in zip(apart, given, strict=True):
                step(optimizer, [g])
        assert bits(mixed) == bits(copies)
        assert contents(together) == [entry for optimizer in apart for entry in contents(optimizer)]

    run_threads(world_size, train)


# --- devices; "meta" stands for a device of another kind


def meta() -> Parameter:
    return Parameter(torch.ones(2, device="meta"))


def test_devices_in_one_group_are_refused_when_it_is_made() -> None:
    with pytest.raises(InputError, match="the parameters of a group are on cpu and meta; give each device a group"):
        OnebitAdam([Parameter(torch.ones(2)), meta()], freeze_step=3)


@pytest.mark.parametrize("everywhere", [True, False], ids=["on all ranks", "on one rank"])
def test_devices_that_one_backend_cannot_carry_are_refused_on_all_ranks_before_anything_moves(everywhere: bool) -> None:
    def train(backend: Backend) -> None:
        backend.device_type = "cpu"  # as Gloo
        guilty = everywhere or backend.rank == 1
        params = [Parameter(torch.ones(2))]
        optimizer = OnebitAdam(
            [{"params": params}, {"params": [meta() if guilty else Parameter(torch.ones(2))]}],
            freeze_step=2,
            backend=backend,
        )
        expected = InputError if guilty else MismatchError
        for _ in range(2):
            with pytest.raises(
                expected, match="there are parameters on cpu and meta, and the 'threads' backend carries"
            ):
                optimizer.step()
            assert bits(params) == bits(torch.ones(2))

    assert ThreadsBackend.device_type is None
    run_threads(2, train)


# --- duplicates, and options that others have


def test_a_parameter_given_twice_is_refused_in_a_group_and_across_groups() -> None:
    p = Parameter(torch.ones(2))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(InputError, match="is in its group twice"),
    ):
        OnebitAdam([p, p], freeze_step=3)
    with pytest.raises(ValueError, match="more than one parameter group"):
        OnebitAdam([{"params": [p]}, {"params": [p]}], freeze_step=3)


def test_no_parameters_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        OnebitAdam([], freeze_step=3)


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"amsgrad": True}, "amsgrad=True is not supported: a running maximum of the variance"),
    ({"foreach": True}, "foreach=True is not supported: the fastest kernels"),
    ({"fused": True}, "fused=True is not supported"),
    ({"capturable": True}, "capturable=True is not supported"),
    ({"differentiable": True}, "differentiable=True is not supported: signs have no derivative"),
    ({"max_grad_norm": 1.0}, r"max_grad_norm=1.0 is not supported: .*clip_grad_norm_"),
    ({"eps_inside_sqrt": True}, "eps_inside_sqrt=True is not supported"),
    ({"comm_backend_name": "nccl"}, "comm_backend_name='nccl' is not supported: the option is called backend"),
]


@pytest.mark.parametrize(("options", "message"), UNSUPPORTED, ids=[next(iter(options)) for options, _ in UNSUPPORTED])
def test_options_of_other_optimizers_are_refused_with_the_reason_in_the_call_and_in_a_group(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"OnebitAdam: {message}"):
        OnebitAdam(parameters(), freeze_step=3, **options)
    optimizer = OnebitAdam(parameters(), freeze_step=3)
    with pytest.raises(InputError, match=f"OnebitAdam: {message}"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))], **options})
    assert len(optimizer.param_groups) == 1


def test_options_that_ask_for_nothing_are_taken_and_names_that_nobody_knows_are_not() -> None:
    OnebitAdam(parameters(), freeze_step=3, amsgrad=False, foreach=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="OnebitAdam: there is no option 'weight_decy'; help"):
        OnebitAdam(parameters(), freeze_step=3, weight_decy=0.1)  # type: ignore[arg-type]
    optimizer = OnebitAdam([{"params": parameters(), "name": "all", "lr_scale": 0.5}], freeze_step=3)
    assert optimizer.param_groups[0]["name"] == "all"


@pytest.mark.parametrize("name", ["compress", "master_weights", "adamw_mode", "bias_correction", "maximize"])
def test_a_switch_is_true_or_false(name: str) -> None:
    with pytest.raises(InputError, match=f"OnebitAdam: {name} must be True or False, got 1"):
        OnebitAdam([{"params": parameters(), name: 1}], freeze_step=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be None or an int of at least 1, the length of the training, got 0"),
        ({"total_steps": 9.0}, "total_steps must be None or an int of at least 1"),
        ({"variance_refresh": -1}, "variance_refresh must be None or an int of at least 0"),
        ({"variance_refresh": True}, "variance_refresh must be None or an int"),
    ],
)
def test_counts_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnebitAdam(parameters(), freeze_step=3, **options)


def test_a_state_of_amsgrad_is_refused_and_nothing_changes() -> None:
    params = parameters()
    amsgrad = AdamW(parameters(), amsgrad=True)
    step(amsgrad, gradients(params, 0, 0))
    optimizer = OnebitAdam(params, freeze_step=3, backend="single")
    step(optimizer, gradients(params, 0, 0))
    before = contents(optimizer)
    with pytest.raises(InputError, match="amsgrad=True is not supported"):
        optimizer.load_state_dict(amsgrad.state_dict())
    assert contents(optimizer) == before


def test_parameters_of_every_group_may_come_from_an_iterator() -> None:
    layers = [torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)]
    optimizer = OnebitAdam([{"params": layer.parameters()} for layer in layers], freeze_step=2)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in layer.parameters()] for layer in layers
    ]
