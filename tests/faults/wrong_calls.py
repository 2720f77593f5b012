"""Random wrong calls of the public names: every one ends with a documented error, and nothing has changed.

A kind of call is a function that draws one and says what it must not change. Optimizers have been trained on two ranks,
so that they hold error feedback, and are asked on one: what is wrong is found before anything is said to the other.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import (
    Backend,
    CompressedAllreduce,
    DenseAllreduce,
    OnebitError,
    Residual,
    broadcast,
    compressed_allreduce,
    make_backend,
    run_threads,
)
from onebit.compress import SignCodec
from onebit.optim import CompressedOptimizer, CPUAdam, checkpoint, clip_grad_norm_, sharded
from onebit.optim.elastic import reshard
from tests.comm.samples import bits, state_bits
from tests.optim.resumable import KINDS, advance, copies, everything, put
from tests.optim.samples import all_params, through_a_file
from tests.optim.spoilt import JUNK, Draw, changed

TRAINED = {"OnebitAdam": 8, "OnebitAdam, auto": 9, "ZeroOneAdam": 11, "OnebitLamb": 8}
AT_ONCE = 250  # calls in which none is made twice
ON_TORCHS_WORD = (TypeError, ValueError)  # torch.optim.Optimizer's own about lists of parameters


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call.

    Attributes:
        what: is wrong with it, for who reads of it.
        make: makes it.
        seen: everything that it must not change.
        also: documented errors that are no `OnebitError`.
        may_be_right: what was drawn may be a right call after all.
    """

    what: object
    make: Callable[[], object]
    seen: Callable[[], object] = lambda: None
    also: tuple[type[Exception], ...] = ()
    may_be_right: bool = False


@dataclass
class Tally:
    """What came of wrong calls.

    Attributes:
        calls, by_kind: how many there were.
        errors: what they were answered with, by its type.
        right: calls that were right after all.
        said: what should not have been: wrong calls that were accepted, undocumented errors, changes.
    """

    calls: int = 0
    right: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    def take_in(self, other: Tally) -> None:
        """Add what was counted elsewhere."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def row(self) -> dict[str, Any]:
        """The counts as they stand in a result."""
        counts = {"calls": self.calls, "right": self.right, "wrong": len(self.said), "said": self.said}
        return {**counts, "by_kind": dict(self.by_kind), "errors": dict(self.errors.most_common())}

    def count(self, kind: str, call: Call) -> None:
        """Make a call and take in what came of it."""
        self.calls += 1
        self.by_kind[kind] += 1
        before = call.seen()
        try:
            call.make()
        except (OnebitError, *call.also) as error:
            self.errors[type(error).__name__] += 1
        except Exception as error:
            self.said.append(f"{kind} of {call.what}: {type(error).__name__}, which is not documented: {error}")
        else:
            self.right += call.may_be_right
            if not call.may_be_right:
                self.said.append(f"{kind} of {call.what}: it was accepted")
            return
        if call.seen() != before:
            self.said.append(f"{kind} of {call.what}: it has changed something")


@functools.cache
def _place() -> tempfile.TemporaryDirectory[str]:
    """Where this process keeps its files until it ends."""
    return tempfile.TemporaryDirectory(prefix="onebit-wrong-calls-")


@functools.cache
def _saved(kind: str) -> tuple[Backend, dict[str, Any], list[Tensor], Path]:
    """What rank 0 of two has after training: its backend, state, parameters, and a folder with the files of both."""
    folder = Path(tempfile.mkdtemp(dir=_place().name))

    def train(backend: Backend) -> tuple[Backend, dict[str, Any], list[Tensor], Path]:
        optimizer = KINDS[kind].make(backend)
        advance(optimizer, backend.rank, 0, TRAINED[kind])
        checkpoint.save(folder, optimizer, params=copies(optimizer))
        return backend, through_a_file(optimizer.state_dict()), copies(optimizer), folder

    return run_threads(2, train)[0]


def _trained(draw: Draw) -> tuple[CompressedOptimizer, str]:
    """A new optimizer that goes on from there, and its kind."""
    kind = draw(st.sampled_from(sorted(TRAINED)))
    backend, state, params, _ = _saved(kind)
    optimizer = KINDS[kind].make(backend)
    put(all_params(optimizer), params)
    optimizer.load_state_dict(copy.deepcopy(state))
    return optimizer, kind


NOT_A_NUMBER: list[Any] = [-1.0, math.nan, "0.1", None, [], True, math.inf, 1j, torch.zeros(2)]
NOT_A_FLAG: list[Any] = [1, None, "yes", 0.0, []]
NOT_A_COUNT: list[Any] = [0, -1, 1.5, "x", True, []]
WRONG: Mapping[str, list[Any]] = {
    "lr": NOT_A_NUMBER,
    "betas": [0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), ("a", 0.9), None, (math.nan, 0.9), "ab", (0.9, 0.9, 0.9)],
    "eps": NOT_A_NUMBER,
    "weight_decay": NOT_A_NUMBER,
    "maximize": NOT_A_FLAG,
    "bias_correction": NOT_A_FLAG,
    "adamw_mode": NOT_A_FLAG,
    "master_weights": NOT_A_FLAG,
    "compress": NOT_A_FLAG,
    "amsgrad": [True],
    "learning_rate": [0.1],
    "freeze_step": [0, -1, 1.5, "soon", None, True, []],
    "var_freeze_step": [0, -1, 1.5, "auto", None, True],
    "local_step_clipper": NOT_A_COUNT,
    "var_update_scaler": NOT_A_COUNT,
    "local_step_scaler": NOT_A_COUNT,
    "variance_refresh": NOT_A_COUNT[1:],
    "variance_floor": NOT_A_NUMBER,
    "coeff_beta": NOT_A_NUMBER,
    "max_coeff": NOT_A_NUMBER[:7],
    "factor_threshold": NOT_A_NUMBER,
    "bucket_mb": [0, -1, math.nan, "x", [], True],
    "check_every": NOT_A_COUNT,
    "codec": ["sign", 3, object(), SignCodec],
    "backend": ["udp", 7, 1.5, b"gloo", object(), ["gloo"], "nccl"],
}
OF_A_GROUP = ("lr", "betas", "eps", "weight_decay", "maximize", "bias_correction", "compress", "master_weights")
NO_TENSORS: list[Any] = [None, 3, "text", [3], [None], [torch.zeros(3), "x"]]


def _wrong_tensor(draw: Draw) -> Tensor:
    """Of a dtype, layout or device that cannot be averaged."""
    dtypes = (torch.int64, torch.float64, torch.complex64, torch.bool, torch.uint8)
    made = [torch.zeros(4, dtype=dtype) for dtype in dtypes]
    return draw(st.sampled_from([*made, torch.zeros(4).to_sparse(), torch.eye(3).to_sparse_csr()]))


def _wrong_parameter(draw: Draw) -> Parameter:
    return Parameter(_wrong_tensor(draw), requires_grad=False)


def constructor(draw: Draw) -> Call:
    """An optimizer with one option of a wrong value, or of another optimizer."""
    kind = KINDS[draw(st.sampled_from(sorted(TRAINED)))]
    name = draw(st.sampled_from(sorted(WRONG)))
    options = {**kind.options, name: draw(st.sampled_from(WRONG[name]))}
    params = [Parameter(torch.ones(3))]
    return Call(what=options, make=lambda: kind.cls(params, **options), seen=lambda: bits(params[0]))  # type: ignore[call-arg]


def constructor_of_parameters(draw: Draw) -> Call:
    """An optimizer of what are no parameters, or not such as can be averaged."""
    kind = KINDS[draw(st.sampled_from(sorted(TRAINED)))]
    good = Parameter(torch.ones(3))
    params = draw(
        st.sampled_from(
            [
                [],
                good,
                *NO_TENSORS,
                [good, good],
                [good, Parameter(torch.empty(3, device="meta"))],
                [{"params": [good]}, {"params": [good]}],
                [{"lr": 0.1}],
                [_wrong_parameter(draw)],
                [good * 2],
            ]
        )
    )
    return Call(
        what=params,
        make=lambda: kind.cls(params, **kind.options),  # type: ignore[call-arg]
        seen=lambda: bits(good),
        also=(*ON_TORCHS_WORD, KeyError),
    )


def cpu_adam(draw: Draw) -> Call:
    """CPUAdam with one wrong option."""
    name = draw(st.sampled_from(["lr", "betas", "eps", "weight_decay", "maximize", "adamw_mode", "amsgrad"]))
    options = {name: draw(st.sampled_from(WRONG[name]))}
    return Call(what=options, make=lambda: CPUAdam([Parameter(torch.ones(3))], **options))


def group(draw: Draw) -> Call:
    """`add_param_group` of something that is none."""
    optimizer, _ = _trained(draw)
    added: Any = draw(
        st.sampled_from(
            [
                {"params": [all_params(optimizer)[0]]},
                {"params": [_wrong_parameter(draw)]},
                {"params": [Parameter(torch.ones(2)), Parameter(torch.empty(3, device="meta"))]},
                {"params": NO_TENSORS[4]},
                {"lr": 0.1},
                {"params": [Parameter(torch.ones(2))], **dict([_option(draw)])},
                *NO_TENSORS[:3],
            ]
        )
    )
    return Call(
        what=added,
        make=lambda: optimizer.add_param_group(added),
        seen=lambda: everything(optimizer),
        also=(*ON_TORCHS_WORD, KeyError),
    )


def _option(draw: Draw) -> tuple[str, Any]:
    name = draw(st.sampled_from(OF_A_GROUP))
    return name, draw(st.sampled_from(WRONG[name]))


def state(draw: Draw) -> Call:
    """`load_state_dict` of a state of which something was removed, replaced, reshaped or added to."""
    optimizer, kind = _trained(draw)
    spoilt = changed(_saved(kind)[1], draw)
    return Call(
        what=kind, make=lambda: optimizer.load_state_dict(spoilt), seen=lambda: everything(optimizer), may_be_right=True
    )


def state_of_something_else(draw: Draw) -> Call:
    """`load_state_dict` of what another optimizer has saved, or of no state at all."""
    optimizer, kind = _trained(draw)
    junk: Any = draw(st.sampled_from([*JUNK, deepspeed_state(kind)]))
    return Call(what=(kind, junk), make=lambda: optimizer.load_state_dict(junk), seen=lambda: everything(optimizer))


def state_of_another(draw: Draw) -> Call:
    """`load_state_dict` of what another optimizer has saved, or one of the same class with other options."""
    optimizer, kind = _trained(draw)
    other = draw(st.sampled_from(sorted(set(TRAINED) - {kind})))
    return Call(
        what=(kind, other),
        make=lambda: optimizer.load_state_dict(_saved(other)[1]),
        seen=lambda: everything(optimizer),
        may_be_right=KINDS[other].cls is KINDS[kind].cls,
    )


def deepspeed_state(kind: str) -> dict[str, Any]:
    """As DeepSpeed's 1-bit optimizers keep it."""
    _, own, params, _ = _saved(kind)
    entry = {"step": 9, "worker_error": torch.zeros(64), "server_error": torch.zeros(32)}
    state = {
        i: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p), **entry} for i, p in enumerate(params)
    }
    groups = [{"params": group["params"], "lr": 0.1} for group in own["param_groups"]]
    return {"state": state, "param_groups": groups}


def checkpoint_file(draw: Draw) -> Call:
    """`checkpoint.load` of files of which one is truncated or has wrong bits, on both ranks."""
    kind = draw(st.sampled_from(sorted(TRAINED)))
    paths = sorted(_saved(kind)[3].iterdir())
    place, guilty = Path(tempfile.mkdtemp(dir=_place().name)), draw(st.integers(0, 1))
    for path in paths:
        (place / path.name).write_bytes(path.read_bytes())
    content = bytearray(paths[guilty].read_bytes())
    at = draw(st.integers(0, len(content) - 1))
    if draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= draw(st.integers(1, 255))
    (place / paths[guilty].name).write_bytes(content)

    def load(backend: Backend) -> None:
        optimizer = KINDS[kind].make(backend)
        before = everything(optimizer)
        try:
            checkpoint.load(place, optimizer)
        except OnebitError:
            assert everything(optimizer) == before
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                (place / paths[backend.rank].name).unlink()

    return Call(
        what=f"byte {at} of {len(content)}", make=lambda: run_threads(2, load), may_be_right=True
    )  # a wrong byte in padding harms nobody


def checkpoint_call(draw: Draw) -> Call:
    """`checkpoint.save` of what cannot be saved, or to where no folder can be; `load` from no folder."""
    optimizer, _ = _trained(draw)
    with tempfile.NamedTemporaryFile(dir=_place().name, delete=False) as file:
        pass
    folder = tempfile.mkdtemp(dir=_place().name)
    cases: list[Callable[[], object]] = [
        lambda: checkpoint.save(folder, optimizer, what=Path("x")),
        lambda: checkpoint.save(folder, optimizer, what=io.BytesIO()),
        lambda: checkpoint.save(folder, optimizer, what=lambda: 0),
        lambda: checkpoint.save(file.name, optimizer),
        lambda: checkpoint.save(f"{file.name}/below", optimizer),
        lambda: checkpoint.load(file.name, optimizer),
        lambda: checkpoint.load(folder, optimizer),
    ]
    case = draw(st.integers(0, len(cases) - 1))
    return Call(
        what=f"case {case}",
        make=cases[case],
        seen=lambda: (everything(optimizer), sorted(Path(folder).iterdir())),
        also=(OSError, RuntimeError),
    )


def sharded_tensors(draw: Draw) -> Call:
    """`sharded.room_for` sizes that are not of a checkpoint."""
    optimizer, _ = _trained(draw)
    named: Mapping[str, Any] = sharded.tensors_of(optimizer)
    junk: Any = draw(st.sampled_from([{}, {"weight": None}, {"rank1.rest": None}, {"rank0.rest": None, "rank2.x": 1}]))
    prefix = draw(st.sampled_from(["", "model.", "rank"]))
    sizes = junk if draw(st.booleans()) else {f"other.{name}": tensor for name, tensor in named.items()}
    return Call(
        what=(sizes, prefix),
        make=lambda: sharded.room_for(optimizer, sizes, prefix),
        seen=lambda: everything(optimizer),
    )


def resharding(draw: Draw) -> Call:
    """`elastic.reshard` of states of which ranks are missing, doubled or of other runs."""
    kind = draw(st.sampled_from(sorted(TRAINED)))
    own, rank, size = _saved(kind)[1], draw(st.integers(-1, 3)), draw(st.integers(-1, 3))
    other = _saved(draw(st.sampled_from(sorted(set(TRAINED) - {kind}))))[1]
    states = draw(st.sampled_from([[], [own], [own, own], [own, other], [own, own, own]]))
    return Call(what=(len(states), rank, size), make=lambda: reshard(states, rank, size), seen=lambda: state_bits(own))


def gradient(draw: Draw) -> Call:
    """`step` with a gradient that cannot be averaged, or with a parameter that has become another."""
    optimizer, _ = _trained(draw)
    _agree_alone(optimizer)
    params = all_params(optimizer)
    p = params[draw(st.sampled_from([0, 3, 5, 6]))]
    p.grad = draw(st.sampled_from([torch.ones_like(p).to_sparse()]))
    return Call(what=p.grad, make=optimizer.step, seen=lambda: everything(optimizer))


def _agree_alone(optimizer: CompressedOptimizer) -> None:
    """As if ranks had agreed, so that what a rank finds later it finds alone."""
    optimizer._agreed = True


def option_of_a_group(draw: Draw) -> Call:
    """`step` on two ranks after an option of a group was set to a wrong value; no rank makes it."""
    kind, (name, value) = draw(st.sampled_from(sorted(TRAINED))), _option(draw)
    everywhere, left = draw(st.booleans()), []

    def train(backend: Backend) -> None:
        optimizer = KINDS[kind].make(backend)
        advance(optimizer, backend.rank, 0, 5)
        if everywhere or backend.rank == 0:
            for one in optimizer.param_groups:
                one[name] = value
        before = everything(optimizer)
        try:
            advance(optimizer, backend.rank, 5, 6)
        finally:
            if backend.rank == 0:
                left.append(everything(optimizer) == before)

    def seen() -> bool:
        return all(left)

    return Call(what=(kind, name, value), make=lambda: run_threads(2, train), seen=seen)


def clipping(draw: Draw) -> Call:
    """`clip_grad_norm_` with a norm that is none."""
    optimizer, _ = _trained(draw)
    params = all_params(optimizer)
    for p in params:
        p.grad = torch.ones_like(p)
    norms = draw(st.sampled_from([(math.nan, 2.0), (-1.0, 2.0), (1.0, 0.0), (1.0, -2.0), (1.0, math.nan), ("x", 2.0)]))
    return Call(
        what=norms,
        make=lambda: clip_grad_norm_(params, *norms, backend="single"),
        seen=lambda: [bits(p.grad) for p in params if p.grad is not None],
    )


def backend(draw: Draw) -> Call:
    """`make_backend` of something that is none, or with a time limit that is none."""
    spec = draw(st.sampled_from(WRONG["backend"]))
    if draw(st.booleans()):
        return Call(what=spec, make=lambda: make_backend(spec))
    limit = draw(st.sampled_from([0, -1.0, math.nan, "x", [], 0.0]))
    return Call(what=limit, make=lambda: make_backend("single", timeout=limit))


def average(draw: Draw) -> Call:
    """`compressed_allreduce` or `DenseAllreduce` of what cannot be averaged."""
    what: Any = draw(st.sampled_from([*NO_TENSORS, _wrong_tensor(draw), [torch.zeros(2), _wrong_tensor(draw)]]))
    make = draw(
        st.sampled_from(
            [
                lambda: compressed_allreduce(what, backend="single"),
                lambda: CompressedAllreduce(what, "single"),
                lambda: DenseAllreduce(what, "single"),
            ]
        )
    )
    return Call(what=what, make=make)


def spread(draw: Draw) -> Call:
    """`broadcast` of what has no bytes of its own, or not in one place each."""
    bad = [
        torch.zeros(4).to_sparse(),
        torch.empty(3, device="meta"),
        torch.zeros(1).expand(3),
        torch.eye(3)[0].as_strided((2, 2), (1, 1)),
    ]
    what: Any = draw(st.sampled_from([*NO_TENSORS, *bad, [torch.zeros(2), *bad[:1]], torch.nn.LazyLinear(3)]))
    return Call(what=what, make=lambda: broadcast(what, "single"))


def average_option(draw: Draw) -> Call:
    """`CompressedAllreduce` with a wrong option, or `broadcast` from no rank."""
    x = torch.ones(5)
    options = draw(
        st.sampled_from(
            [
                *({"bucket_mb": value} for value in WRONG["bucket_mb"]),
                *({"codec": value} for value in WRONG["codec"]),
                *({"residual": value} for value in ("x", torch.zeros(5), 3)),
                *({"mode": value} for value in ("fast", 3, None)),
            ]
        )
    )
    if draw(st.booleans()):
        return Call(what=options, make=lambda: CompressedAllreduce(x, "single", **options), seen=lambda: bits(x))
    source = draw(st.sampled_from([-1, 1, 99, "x", 0.5]))
    return Call(what=source, make=lambda: broadcast(x, "single", source=source), seen=lambda: bits(x))


def another_tensor(draw: Draw) -> Call:
    """An average called with other tensors than it was made for."""
    like, make = [torch.ones(5), torch.ones(2, 3)], draw(st.sampled_from([CompressedAllreduce, DenseAllreduce]))
    reduce: Any = make(like, "single")
    others: Any = draw(
        st.sampled_from(
            [
                [torch.ones(5)],
                [torch.ones(5), torch.ones(3, 2)],
                [torch.ones(5), torch.ones(2, 3).half()],
                [torch.ones(5), torch.empty(2, 3, device="meta")],
                [torch.ones(5), torch.ones(2, 3), torch.ones(1)],
                [torch.ones(5), torch.eye(3)[:2].to_sparse()],
                torch.ones(5),
                *NO_TENSORS,
            ]
        )
    )
    return Call(what=others, make=lambda: reduce(others), seen=lambda: reduce.stats.calls)


def feedback(draw: Draw) -> Call:
    """`Residual.load_state_dict` of a spoilt state, `rescale` by no number."""
    kind = draw(st.sampled_from(sorted(TRAINED)))
    good = _saved(kind)[1]["onebit"]["residuals"][0]
    residual = Residual()
    residual.load_state_dict(copy.deepcopy(good))
    if draw(st.booleans()):
        spoilt = changed(good, draw)
        return Call(
            what=spoilt,
            make=lambda: residual.load_state_dict(spoilt),
            seen=lambda: state_bits(residual.state_dict()),
            may_be_right=True,
        )
    factor = draw(st.sampled_from([math.nan, math.inf, -math.inf, "x", None]))
    return Call(what=factor, make=lambda: residual.rescale(factor), seen=lambda: state_bits(residual.state_dict()))


def codec(draw: Draw) -> Call:
    """A codec of wrong options, or with tensors of wrong kinds, sizes and devices."""
    good, x, out = SignCodec(block_size=64), torch.randn(100), torch.zeros(100)
    residual, payload = torch.randn(128), SignCodec(block_size=64).encode(torch.ones(100))
    wrong, size = _wrong_tensor(draw), draw(st.sampled_from([0, 1, 7, 15, 99]))
    bad_bytes = draw(st.sampled_from([payload[1:], payload.float(), payload.to("meta"), payload.repeat(2)[::2], wrong]))
    block_size, numel = (
        draw(st.sampled_from([0, -32, 33, 1.5, "x", True])),
        draw(st.sampled_from([-1, 10**6, 1.5, "x"])),
    )
    cases: list[Callable[[], object]] = [
        lambda: SignCodec(block_size=block_size),
        lambda: SignCodec(scale="max"),  # type: ignore[arg-type]
        lambda: good.encode(wrong, residual),
        lambda: good.encode(x, residual[:size] if size else residual.repeat(9)),
        lambda: good.encode(x, residual.to("meta")),
        lambda: good.encode(x, wrong),
        lambda: good.encode(x, residual, out=payload[1:]),
        lambda: good.encode(x, residual, mask=torch.ones(3, dtype=torch.uint8)),
        lambda: good.decode(bad_bytes, out),
        lambda: good.decode(payload, torch.zeros(size * 100 + 300)),
        lambda: good.decode(payload),
        lambda: good.reduce_encode(bad_bytes, residual, numel=100),
        lambda: good.reduce_encode(payload, residual, numel=numel),
    ]
    case = draw(st.integers(0, len(cases) - 1))
    return Call(what=f"case {case}", make=cases[case], seen=lambda: [bits(t) for t in (x, residual, payload, out)])


CALLS: list[Callable[[Draw], Call]] = [
    constructor,
    constructor_of_parameters,
    cpu_adam,
    group,
    state,
    state_of_something_else,
    state_of_another,
    checkpoint_file,
    checkpoint_call,
    sharded_tensors,
    resharding,
    gradient,
    option_of_a_group,
    clipping,
    backend,
    average,
    spread,
    average_option,
    another_tensor,
    feedback,
    codec,
]


def wrong_calls(count: int, number: int) -> Tally:
    """Make so many wrong calls, drawn with a seed; returns what came of them."""
    tally = Tally()
    while tally.calls < count:  # Hypothesis leaves out what it has drawn before, and takes ever longer to see to that

        @seed(number + tally.calls)
        @settings(
            max_examples=min(count - tally.calls, AT_ONCE),
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def make(data: st.DataObject) -> None:
            kind = data.draw(st.sampled_from(CALLS))
            tally.count(kind.__name__, kind(data.draw))

        make()
    return tally
