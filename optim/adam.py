"""What CPUAdam and FusedAdam share: Adam's options, what is refused before anything changes, and torch's state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from onebit.comm.tensors import describe
from onebit.compress import InputError
from onebit.compress.kernels import DTYPES
from onebit.optim.adam_state import Saved, read_state
from onebit.optim.options import check_adam_options, check_flags
from onebit.optim.state_keys import DECOUPLED

MOMENTS = ("exp_avg", "exp_avg_sq")

REFUSED = {
    "amsgrad": "the maximum of past variances is not kept; use torch.optim.AdamW(amsgrad=True)",
    "foreach": "all tensors are updated together anyway; leave it out",
    "fused": "the whole update is one kernel anyway; leave it out",
    "differentiable": "the update is no part of a graph; use torch.optim.AdamW(differentiable=True)",
    "capturable": "steps on the CPU are not captured; leave it out",
}

_dtype, _layout = attrgetter("dtype"), attrgetter("layout")


@dataclass(frozen=True)
class Ready:
    """A group's parameters that have a gradient, with these gradients; nothing has changed yet."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]


class AdamBase(torch.optim.Optimizer):
    """Adam or AdamW without communication; a subclass says where parameters live and makes the update.

    A step is checked whole before any of it is made. Steps are counted per parameter, so one that now and then has no
    gradient is corrected for its own number of steps, as in torch.

    The state of a parameter is `step` (0-dim fp32), `exp_avg` and `exp_avg_sq` (in the memory order of the parameter
    where that has no gaps, else contiguous), and a state_dict is one that `torch.optim.AdamW` and `Adam` take.
    """

    mode_option: ClassVar[str]  # the name of the option that tells AdamW from Adam
    device_type: ClassVar[str]  # where the parameters have to be
    own_options: ClassVar[tuple[str, ...]] = ()  # options that loading a state does not change
    extra_tensors: ClassVar[tuple[str, ...]] = ()  # what a state may hold beside the moments

    def __init__(self, params: Any, defaults: dict[str, Any], refused: Mapping[str, object]) -> None:
        """Check and take over.

        Args:
            defaults: lr, betas, eps, weight_decay, bias_correction, maximize, what `mode_option` names, and whatever
                else a group of the subclass has.
            refused: keyword arguments that it has no parameter for; those of torch may stand there if they are off.

        Raises:
            InputError: an option or a parameter that cannot be used.
            TypeError: an argument that is not known to torch either.
        """
        for name, value in refused.items():
            if name not in REFUSED:
                raise TypeError(f"{type(self).__name__} has no option {name!r}")
            if value:
                raise InputError(f"{type(self).__name__}: {name}={value!r} is refused: {REFUSED[name]}")
        _betas_to_numbers(defaults)
        self._check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their group has the defaults where it says nothing else.

        Raises:
            InputError: an option or a parameter cannot be used; nothing was added.
        """
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            group = self.param_groups[before]
            _betas_to_numbers(group)
            self._check_options(group)
            self._check_params(group)
        except InputError:
            del self.param_groups[before:]
            raise
        self._forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            InputError: an option, a parameter or a gradient that cannot be used; no parameter and no state was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = []
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor) or group["lr"].is_cpu:  # reading another would wait for its device
                self._check_options(group)
            ready.append(self._ready(group))
        self._update(ready)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's; with the option that tells AdamW from Adam under torch's name as well, so that torch reads it."""
        saved: dict[str, Any] = super().state_dict()
        for group in saved["param_groups"]:
            group[DECOUPLED] = group[self.mode_option]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a copy of a state: of this class, of torch, of DeepSpeed's or apex's Adam; see `read_state`.

        Moments keep the dtype that this optimizer was made with. Options of the groups are those of the state.

        Raises:
            InputError: it does not fit or has options that cannot be used; nothing was changed.
        """
        states: list[dict[str, Tensor]] = []

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            saved = self._read(given)
            states.extend(saved.states)
            groups = [
                {**group, "params": then["params"]}
                for group, then in zip(saved.groups, given["param_groups"], strict=True)
            ]
            return {"state": {}, "param_groups": groups}

        def place(_: torch.optim.Optimizer) -> None:
            every = [(group, p) for group in self.param_groups for p in group["params"]]
            for (group, p), state in zip(every, states, strict=True):
                if state:
                    self.state[p] = self._take(group, p, state)

        # Last before torch reads the state, and first after: torch would cast moments to the parameter's dtype, and
        # hooks of the user see what they would see with torch's own optimizers.
        hooks = [self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(place, True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    @abstractmethod
    def _update(self, ready: Sequence[Ready]) -> None:
        """Make the step for all groups."""

    def _forget(self) -> None:
        """Drop what was derived from parameters, groups or states: they have changed; also called before __init__."""

    def _moment_dtype(self, group: Mapping[str, Any], p: Tensor, key: str) -> torch.dtype:
        """The dtype of exp_avg, of exp_avg_sq, or of one of `extra_tensors`."""
        return torch.float32

    def _new_step(self, group: Mapping[str, Any], p: Tensor) -> Tensor:
        """A step count of 0."""
        return torch.zeros((), dtype=torch.float32)

    def _state_of(self, group: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
        """The state of a parameter, made if it has none."""
        state: dict[str, Any] = self.state[p]
        if not state:
            moments = {key: dense_like(p, self._moment_dtype(group, p, key)).zero_() for key in MOMENTS}
            state.update(moments, step=self._new_step(group, p))
        return state

    def _take(self, group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A parameter's own state from a saved one."""
        state = {"step": self._new_step(group, p).copy_(saved["step"])}
        for key in saved.keys() - {"step"}:
            state[key] = dense_like(p, self._moment_dtype(group, p, key)).copy_(saved[key])
        return state

    def _read(self, given: Mapping[str, Any]) -> Saved:
        owner = type(self).__name__
        saved = read_state(
            owner, given, self.param_groups, mode=self.mode_option, own=self.own_options, extra=self.extra_tensors
        )
        for group in saved.groups:
            _betas_to_numbers(group)
            self._check_options(group)
        return saved

    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise InputError if an option of a group, without its parameters, cannot be used."""
        check_adam_options(type(self).__name__, group)
        check_flags(type(self).__name__, group, "bias_correction", "maximize", self.mode_option)

    def _check_params(self, group: Mapping[str, Any]) -> None:
        params = group["params"]
        if len(set(params)) < len(params):
            raise InputError(f"{type(self).__name__}: a parameter stands in its group twice; give each only once")
        for index, p in enumerate(params):
            problem = self._problem(p)
            if not problem and any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
                problem = "has elements that share memory; make it contiguous"
            if problem:
                raise InputError(f"{type(self).__name__}: parameter {_name(group, index)}, {describe(p)}, {problem}")

    def _ready(self, group: dict[str, Any]) -> Ready:
        """Parameters with their gradients, checked in some hundred nanoseconds for each."""
        params = group["params"]
        every = [p.grad for p in params]
        grads = [g for g in every if g is not None]
        if len(grads) < len(params):
            params = [p for p, g in zip(params, every, strict=True) if g is not None]
        here = attrgetter(f"is_{self.device_type}")
        if not (
            set(map(_layout, grads)) <= {torch.strided}
            and set(map(_dtype, grads)) <= set(DTYPES)
            and set(map(_dtype, params)) <= set(DTYPES)
            and all(map(here, grads))
            and all(map(here, params))
        ):
            raise self._complaint(group)
        return Ready(group, params, grads)

    def _complaint(self, group: Mapping[str, Any]) -> InputError:
        """The error for the first parameter or gradient that cannot be used."""
        for index, p in enumerate(group["params"]):
            for what, tensor in (("", p), ("the gradient of ", p.grad)):
                problem = None if tensor is None else self._problem(tensor)
                if problem:
                    name = f"{what}parameter {_name(group, index)}, {describe(tensor)},"
                    return InputError(f"{type(self).__name__}.step: {name} {problem}; nothing was changed")
        raise AssertionError("every parameter and gradient can be used")

    def _problem(self, tensor: Tensor) -> str | None:
        """Why this parameter or gradient cannot be used; None if it can."""
        if tensor.layout != torch.strided:
            return "is sparse; use dense ones (sparse=False in nn.Embedding)"
        if tensor.dtype not in DTYPES:
            return "must be float32, bfloat16 or float16; convert it"
        if tensor.device.type != self.device_type:
            return f"must be on a {self.device_type} device; move it there, or choose the optimizer for where it is"
        return None


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie without gaps and without overlap, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def dense_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of p's shape, not initialised; with p's strides where p is dense, else contiguous."""
    order = torch.preserve_format if is_dense(p) else torch.contiguous_format
    return torch.empty_like(p, dtype=dtype, memory_format=order, requires_grad=False)


def _betas_to_numbers(group: dict[str, Any]) -> None:
    """Torch takes betas as tensors with one element, too, and makes numbers of them."""
    betas = group["betas"]
    if isinstance(betas, (tuple, list)):
        group["betas"] = tuple(
            float(beta) if isinstance(beta, Tensor) and beta.numel() == 1 else beta for beta in betas
        )


def _name(group: Mapping[str, Any], index: int) -> str:
    names = group.get("param_names")
    return f"{index} ({names[index]})" if names else str(index)
