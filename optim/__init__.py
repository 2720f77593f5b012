"""Optimizers that average over ranks in about one bit per parameter, as thin consumers of `onebit.comm`."""

from onebit.optim import roots  # noqa: F401  # before any step
from onebit.optim.base import CompressedOptimizer
from onebit.optim.clip import clip_grad_norm_
from onebit.optim.cpu_adam import CPUAdam
from onebit.optim.fused_adam import FusedAdam
from onebit.optim.onebit_adam import OnebitAdam
from onebit.optim.onebit_lamb import OnebitLamb
from onebit.optim.replicas import check_replicas
from onebit.optim.stop import in_step
from onebit.optim.zero_one_adam import ZeroOneAdam

__all__ = [
    "CPUAdam",
    "CompressedOptimizer",
    "FusedAdam",
    "OnebitAdam",
    "OnebitLamb",
    "ZeroOneAdam",
    "check_replicas",
    "clip_grad_norm_",
    "in_step",
]
