"""Adam and AdamW on CUDA parameters: all tensors of a device in a few launches, in one pass over memory."""

from __future__ import annotations

import functools
import importlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from onebit.compress import InputError
from onebit.optim.adam import AdamBase, Ready
from onebit.optim.gpu.adam_share import AdamShare
from onebit.optim.gpu.adam_step import MASTER, Kernels

_log = logging.getLogger(__name__)


class FusedAdam(AdamBase):
    """`torch.optim.AdamW` or `Adam` of fp32, bf16 and fp16 parameters on CUDA devices, in one pass over memory.

    All tensors of a device are updated together, in one launch for each mix of dtypes; CuPy compiles the kernels in
    seconds at the first step on a machine, later ones load them. Moments are fp32. Step counts, bias corrections and a
    learning rate that is a CUDA tensor stay on the device, so a step never waits for it. A `torch.amp.GradScaler`
    needs no pass of its own: gradients are unscaled as they are read, and left as they are; a step that found an inf or
    a NaN changes nothing.

    Gradients may have another dtype than their parameter and lie in memory in any order. A step is fastest where
    parameters are dense and gradients lie as they do; others are copied for the step.

    Args:
        params, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        lr: a number, or a tensor with one element. One on the parameters' device is read by the kernels, so that a
            scheduler acts on a captured graph too.
        adam_w_mode: True: decoupled weight decay (AdamW); False: decay is added to the gradient (Adam).
        bias_correction: False leaves the factors 1-β₁ᵗ and 1-β₂ᵗ out.
        capturable: a step may be captured in a CUDA graph, after one that was not captured.
        master_weights: updates accumulate in an fp32 copy of each bf16 and fp16 parameter, ``state[p]["master"]``. It
            starts as the parameter, which is from then on overwritten from it, whatever else has changed it.
        zero_gradients: each gradient is set to zero in the pass that reads it, so `zero_grad` need not be called.
        refused: torch's other options may be given if they are off; an InputError tells why one that is on cannot be.

    Raises:
        InputError: an option is out of range or a parameter cannot be used.
    """

    mode_option = "adam_w_mode"
    device_type = "cuda"
    own_options = ("capturable", "master_weights", "zero_gradients")
    extra_tensors = (MASTER,)

    _step_supports_amp_scaling = True  # what torch.amp.GradScaler asks
    _touched = True  # somebody has looked at `state` since the last step, so any of it may have changed
    _known: _Known | None = None
    _captured: frozenset[AdamShare] = frozenset()  # graphs refer to their tables, so they live as long as this

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        maximize: bool = False,
        capturable: bool = False,
        master_weights: bool = False,
        zero_gradients: bool = False,
        **refused: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adam_w_mode": adam_w_mode,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "capturable": capturable,
            "master_weights": master_weights,
            "zero_gradients": zero_gradients,
        }
        super().__init__(params, defaults, refused)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """As torch's. Change it by way of this attribute: else an exchanged tensor may be noticed some steps later."""
        self._touched = True
        state: defaultdict[Tensor, Any] = self.__dict__["state"]
        return state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._touched = True
        self.__dict__["state"] = state

    @property
    def kernels(self) -> str:
        """``"gpu"``: this project's; ``"torch"``: torch's fused kernel, for want of CuPy."""
        return _kernels()[0]

    def _ready(self, group: dict[str, Any]) -> Ready:
        # Checking all tensors takes longer than all the rest, so it is done only when one of them has moved.
        return Ready(group, group["params"], [])

    def _update(self, ready: Sequence[Ready]) -> None:
        shares = self._shares(ready)
        try:
            moved = [share.look(self._touched) for share in shares]
        except RuntimeError:  # a sparse gradient has no address
            self._check_all()
            raise
        if any(moved):
            self._check_all()
            for share in shares:
                share.adopt(self.param_groups)
        for share in shares:
            share.make(self.param_groups, getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        self._touched = False

    def _shares(self, ready: Sequence[Ready]) -> Sequence[AdamShare]:
        """The parameters that have a state, by device."""
        params = [r.params for r in ready]
        capturing = self.device_type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and not all(group["capturable"] for group in self.param_groups):
            raise InputError("FusedAdam.step: a CUDA graph is being captured; make the optimizer with capturable=True")
        if self._known is None or not self._known.still(params, self.state if self._touched else None):
            if capturing:
                raise InputError(
                    "FusedAdam.step: a CUDA graph is being captured, but a parameter has no state yet or another one; "
                    "make one step with the same gradients before the capture"
                )
            self._known = self._look_around()
        if capturing:
            self._captured = self._captured | set(self._known.shares)
        return self._known.shares

    def _look_around(self) -> _Known:
        self._check_all()
        of_device: dict[torch.device, _Members] = defaultdict(_Members)
        idle = []
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    self._state_of(group, p)
                if self.state.get(p):
                    of_device[p.device].add(p, self.state[p], number)
                else:
                    idle.append(p)
        kernels = _kernels()[1]
        shares = [AdamShare(m.params, m.states, m.groups, kernels) for m in of_device.values()]
        params = [list(group["params"]) for group in self.param_groups]
        return _Known(params, list(self.state.values()), idle, shares)

    def _check_all(self) -> None:
        for group in self.param_groups:
            super()._ready(group)

    def _forget(self) -> None:
        self._known = None

    def _problem(self, tensor: Tensor) -> str | None:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and self.device_type == "cuda":
            return "is on the CPU; use onebit.optim.CPUAdam, or move the model to a CUDA device first"
        return super()._problem(tensor)


@dataclass
class _Members:
    """The parameters of one device that have a state, with this and the number of their group."""

    params: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def add(self, p: Tensor, state: dict[str, Any], group: int) -> None:
        self.params.append(p)
        self.states.append(state)
        self.groups.append(group)


@dataclass(frozen=True)
class _Known:
    """What the shares were made from.

    Attributes:
        params: of every group.
        states: the entries of the optimizer's state.
        idle: parameters that have none, because they never had a gradient.
        shares: of every device.
    """

    params: list[list[Tensor]]
    states: list[dict[str, Any]]
    idle: list[Tensor]
    shares: list[AdamShare]

    def still(self, params: Sequence[Sequence[Tensor]], state: Mapping[Tensor, Any] | None) -> bool:
        """Whether parameters and entries are the same objects as then, and the idle ones still have no gradient.

        state: None: nobody has touched it.
        """
        return (
            [len(group) for group in params] == [len(group) for group in self.params]
            and all(map(is_, chain.from_iterable(params), chain.from_iterable(self.params)))
            and (state is None or (len(state) == len(self.states) and all(map(is_, state.values(), self.states))))
            and all(p.grad is None for p in self.idle)
        )


@functools.cache
def _kernels() -> tuple[str, Kernels]:
    """What steps are made with, and its name; what is slow for want of a package is said once."""
    try:
        importlib.import_module("cupy")
    except ImportError as error:
        _log.warning(
            "FusedAdam uses torch's own fused kernel, which is right but slower: this project's kernels need CuPy, pip "
            "install 'onebit[cuda13]' or 'onebit[cuda12]' (%s). FusedAdam.kernels tells which are used",
            error,
        )
        return "torch", importlib.import_module("onebit.optim.gpu.adam_torch").TorchSteps
    return "gpu", importlib.import_module("onebit.optim.gpu.adam").AdamLaunches
