"""Copied, pickled, hooked and compiled: whatever people do to torch's optimizers can be done to these."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from onebit.comm import Backend, InputError, run_threads
from onebit.compress import SignCodec
from tests.comm.samples import bits, state_bits
from tests.optim.loops import KINDS, STEPS, backward, batch, loss_of, make, network


def train_step(model: nn.Module, optimizer: Any, rank: int, number: int) -> None:
    optimizer.zero_grad()
    backward(loss_of(model, rank, number))
    optimizer.step()


def seen(model: nn.Module, optimizer: Any) -> Any:
    return bits(list(model.parameters())), state_bits(optimizer.state_dict())


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


# --- copies


@pytest.mark.parametrize("after", [0, 3, 7, 10])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_model_and_optimizer_goes_on_as_the_original_does_and_touches_nothing_of_it(
    kind: str, copied: Callable[[Any], Any], after: int
) -> None:
    def train(backend: Backend) -> None:
        model = network()
        optimizer = make(kind, model.parameters(), None, codec=SignCodec(block_size=64), bucket_mb=0.01)
        for number in range(after):
            train_step(model, optimizer, backend.rank, number)
        model2, optimizer2 = copied((model, optimizer))
        before = seen(model, optimizer)
        assert seen(model2, optimizer2) == before
        ways = []
        for number in range(after, STEPS):
            train_step(model2, optimizer2, backend.rank, number)
            ways.append(seen(model2, optimizer2))
        assert seen(model, optimizer) == before
        for number, way in zip(range(after, STEPS), ways, strict=True):
            train_step(model, optimizer, backend.rank, number)
            assert seen(model, optimizer) == way

    run_threads(2, train)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_every_option_that_the_constructor_takes(kind: str) -> None:
    cls, _ = KINDS[kind]
    taken = set(inspect.signature(cls.__init__).parameters) - {"self", "params", "unsupported"}
    options = {"check_every": 3, "bucket_mb": 2, "lr": 0.5, **({"overlap": True} if "overlap" in taken else {})}
    made = make(kind, network().parameters(), "single", **options)
    assert taken <= {*made.defaults, *made._settings()}
    for _ in range(2):  # the second is a copy of a copy
        before, made = made, copy.deepcopy(made)
        assert type(made) is cls
        assert made._settings() == before._settings()
        assert (made._check_every, made._bucket_mb, made.defaults["lr"]) == (3, 2.0, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_shares_the_backend_and_a_pickle_of_a_backend_that_is_an_object_is_refused(kind: str) -> None:
    def train(backend: Backend) -> None:
        optimizer = make(kind, network().parameters(), backend)
        assert copy.deepcopy(optimizer).backend is backend
        with pytest.raises(InputError, match=r"has the backend 'threads'.* save its state_dict\(\)"):
            pickle.dumps(optimizer)

    run_threads(2, train)


# --- hooks


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run_once_around_every_step_and_every_state_dict(kind: str) -> None:
    model = network()
    optimizer = make(kind, model.parameters(), "single")
    told: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: told.append("before the step"))
    optimizer.register_step_post_hook(lambda *_: told.append("after it"))
    optimizer.register_state_dict_pre_hook(lambda _: told.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: told.append(f"given {state['mine']}"))
    optimizer.register_load_state_dict_post_hook(lambda _: told.append("loaded"))
    train_step(model, optimizer, 0, 0)
    assert told == ["before the step", "after it"]
    told.clear()
    state = optimizer.state_dict()
    assert told == ["before saving"]
    assert state["mine"] == 1
    assert "onebit" in state
    told.clear()
    optimizer.load_state_dict(state)
    assert told == ["given 1", "loaded"]


# --- torch.compile


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_loop_leaves_the_step_to_python_and_changes_no_bit(kind: str) -> None:
    (model, twin) = (network(), network())
    optimizer, eager = (make(kind, m.parameters(), "single") for m in (model, twin))

    @torch.compile(backend="eager")
    def compiled() -> None:
        optimizer.step()

    for number in range(STEPS):
        for m in (model, twin):
            m.zero_grad()
            backward(loss_of(m, 0, number))
        compiled()
        eager.step()
        assert bits(list(model.parameters())) == bits(list(twin.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_one_whole_graph_is_refused_by_torch_and_not_made(kind: str) -> None:
    model = network()
    optimizer = make(kind, model.parameters(), "single")
    backward(loss_of(model, 0, 0))
    before = bits(list(model.parameters()))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    assert bits(list(model.parameters())) == before


# A whole graph may add in another order than one operation after the other; these two run torch's own operations.
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_trained_as_the_eager_one(kind: str, compiler: str) -> None:
    inputs = [batch(0, number) for number in range(STEPS)]

    def train(compiled: bool) -> list[Any]:
        model = network()
        optimizer = make(kind, model.parameters(), "single")
        call = torch.compile(model, backend=compiler) if compiled else model
        for x, y in inputs:
            optimizer.zero_grad()
            backward(nn.functional.mse_loss(call(x), y))
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    for made, expected in zip(train(True), train(False), strict=True):
        # aot_eager decomposes LayerNorm and GELU into other operations: a few roundings a step, and steps of 1e-2.
        torch.testing.assert_close(made, expected, rtol=0, atol=0 if compiler == "eager" else 1e-4)
