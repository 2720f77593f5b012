"""Adam and AdamW of CPU parameters in one pass over memory, without a compiler on the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebit.comm.tensors import describe
from onebit.compress import InputError
from onebit.optim.adam import AdamBase, Ready, is_dense

if TYPE_CHECKING:
    from onebit.optim.cpu.adam_tables import Tables

_MOMENT_DTYPES = (torch.float32, torch.bfloat16)


class CPUAdam(AdamBase):
    """`torch.optim.AdamW` or `Adam` of fp32, bf16 and fp16 parameters on the CPU, in one pass over memory.

    Numba compiles the pass at the first step of the first process, in about two seconds; later ones load it. All
    tensors of all groups are updated together, by as many threads as `onebit.compress.num_threads` says: the cores of
    this process divided by the ranks on this machine. Arithmetic is fp32, and what is stored in 16 bits is rounded to
    nearest, ties to even.

    Gradients may have another dtype than their parameter and lie in memory in any order. A step is fastest where
    parameters are dense and gradients lie as they do; others are copied for the step.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        adamw_mode: True: decoupled weight decay (AdamW); False: decay is added to the gradient (Adam).
        bias_correction: False leaves the factors 1-β₁ᵗ and 1-β₂ᵗ out.
        fp32_optimizer_states: False: moments have their parameter's dtype, as in torch; fp32 or bf16.
        exp_avg_dtype, exp_avg_sq_dtype: dtype of one moment, fp32 or bf16, whatever `fp32_optimizer_states` says. A
            variance in bf16 does not notice a change of less than 1/512 of itself, so with β₂ = 0.999 it stops short
            of decaying.
        refused: torch's other options may be given if they are off; an InputError tells why one that is on cannot be.

    Raises:
        InputError: an option is out of range or a parameter cannot be used.
    """

    mode_option = "adamw_mode"
    device_type = "cpu"
    own_options = ("fp32_optimizer_states", "exp_avg_dtype", "exp_avg_sq_dtype")

    # Defaults of the class: neither a copied nor an unpickled optimizer has any.
    _copies: Mapping[Tensor, Tensor] = MappingProxyType({})
    _tables: Tables | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        adamw_mode: bool = True,
        bias_correction: bool = True,
        maximize: bool = False,
        fp32_optimizer_states: bool = True,
        exp_avg_dtype: torch.dtype | None = None,
        exp_avg_sq_dtype: torch.dtype | None = None,
        **refused: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adamw_mode": adamw_mode,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "fp32_optimizer_states": fp32_optimizer_states,
            "exp_avg_dtype": exp_avg_dtype,
            "exp_avg_sq_dtype": exp_avg_sq_dtype,
        }
        super().__init__(params, defaults, refused)

    def keep_copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Write `copies[p]` now, and from now on in the same pass as the parameter p, rounded; for offloaded training.

        The tensors are yours, pinned for instance, and replace those of an earlier call. They are not part of the
        state: a copied, unpickled or loaded optimizer wants to be told again, and a parameter that something else
        changes is copied at its next step.

        Args:
            copies: for some or all fp32 parameters a bf16 or fp16 tensor of the same shape and strides on the CPU.

        Raises:
            InputError: a tensor cannot be used; nothing was changed.
        """
        params = {p: None for group in self.param_groups for p in group["params"]}
        for p, copy in copies.items():
            if p not in params or p.dtype != torch.float32 or not is_dense(p):
                raise InputError(
                    f"CPUAdam.keep_copies: {describe(p)} must be a dense float32 parameter of this optimizer"
                )
            wanted = copy.is_cpu and copy.dtype in (torch.bfloat16, torch.float16) and copy.layout == torch.strided
            if not wanted or copy.shape != p.shape or copy.stride() != p.stride():
                raise InputError(
                    f"CPUAdam.keep_copies: the copy of {describe(p)} with strides {p.stride()} must be a bfloat16 or "
                    f"float16 tensor of that shape and these strides on the CPU, got {describe(copy)} with strides "
                    f"{copy.stride()} on {copy.device}; torch.empty_like(p, dtype=torch.bfloat16) makes one"
                )
        self._copies = dict(copies)
        self._forget()
        with torch.no_grad():
            for p, copy in copies.items():
                copy.copy_(p)

    def _ready(self, group: dict[str, Any]) -> Ready:
        return Ready(group, group["params"], [])  # _update looks at gradients, and checks what is not where it was

    def _update(self, ready: Sequence[Ready]) -> None:
        from onebit.optim.cpu.adam_step import update  # imports Numba

        every = [p for one in ready for p in one.params]
        tables = self._tables
        if tables is None or not tables.serve(every, self.state):
            tables = self._new_tables(every)
        update(tables, self.param_groups, self.mode_option)
        self._tables = tables if tables.lasting else None

    def _new_tables(self, every: Sequence[Tensor]) -> Tables:
        from onebit.optim.cpu.adam_tables import Operands, Tables

        groups = [super(CPUAdam, self)._ready(group) for group in self.param_groups]  # all are checked before any state
        params = [p for one in groups for p in one.params]
        states = [self._state_of(one.group, p) for one in groups for p in one.params]
        operands = Operands(
            params=params,
            grads=[g for one in groups for g in one.grads],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            steps=[state["step"] for state in states],
            copies=[self._copies.get(p) for p in params] if self._copies else [],
            counts=[len(one.params) for one in groups],
        )
        return Tables(operands, every, self.state)

    def _forget(self) -> None:
        self._tables = None

    def _moment_dtype(self, group: Mapping[str, Any], p: Tensor, key: str) -> torch.dtype:
        chosen: torch.dtype | None = group[f"{key}_dtype"]
        if chosen is not None:
            return chosen
        return torch.float32 if group["fp32_optimizer_states"] else p.dtype

    def _check_options(self, group: Mapping[str, Any]) -> None:
        super()._check_options(group)
        for key in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            if group[key] not in (None, *_MOMENT_DTYPES):
                raise InputError(
                    f"CPUAdam: {key} must be None, torch.float32 or torch.bfloat16, got {group[key]!r} (in float16 the "
                    "variance of a gradient below 1e-4 is 0)"
                )

    def _check_params(self, group: Mapping[str, Any]) -> None:
        super()._check_params(group)
        for key in ("exp_avg", "exp_avg_sq"):
            for p in group["params"]:
                if self._moment_dtype(group, p, key) not in _MOMENT_DTYPES:
                    raise InputError(
                        f"CPUAdam: fp32_optimizer_states=False would keep {key} of {describe(p)} in float16, which is "
                        f"too coarse for it; set {key}_dtype to torch.bfloat16 or torch.float32"
                    )
