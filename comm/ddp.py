"""Hooks that fit models in `DistributedDataParallel`: gradients averaged when an optimizer asks, or compressed."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from onebit.comm.ddp_average import AveragingHook, AveragingOptimizer
from onebit.comm.ddp_compress import CompressedHook
from onebit.compress import Codec
from onebit.compress.errors import InputError

__all__ = ["AveragingHook", "AveragingOptimizer", "CompressedHook", "attach", "compress_gradients", "unattached"]


def attach(model: torch.nn.Module, optimizer: AveragingOptimizer) -> None:
    """Have DDP average gradients when the optimizer's next step needs their exact mean, and else leave them local.

    In warm-up gradients are averaged in fp32 during backward, as DDP does; those of parameters in half precision are
    rounded once afterwards. In compressed steps DDP sends nothing but what it needs for itself, such as buffers, and
    the optimizer averages. Where parameter groups differ in that, the optimizer averages for all of them. It does so in
    its first step too, and in every step that a `torch.amp.GradScaler` drives, whose scale may differ between ranks.

    Args:
        model: a `DistributedDataParallel` model without a communication hook, or what torch.compile made of one.
        optimizer: one of `onebit.optim` that compresses, over all the model's parameters and no others.

    Raises:
        InputError: model or optimizer are of another kind, do not belong together, or have a hook already; nothing was
            changed.
        BackendError: the optimizer's backend cannot be used.
    """
    ddp = _without_hook(model, "attach")
    name = type(optimizer).__name__
    if not hasattr(type(optimizer), "averages_next_step"):
        raise InputError(
            f"attach takes an optimizer of onebit.optim that compresses, itself and no wrapper around it, got {name}; "
            "inside of Accelerate's wrapper it is optimizer.optimizer; for optimizers of other kinds use "
            "onebit.comm.ddp.compress_gradients(model)"
        )
    if optimizer.averager is not None:
        raise InputError(f"attach: this {name} is attached to a model already; make one optimizer per model")
    _check_parameters(ddp, optimizer)
    backend, group = optimizer.backend, ddp.process_group
    if (backend.rank, backend.size) != (group.rank(), group.size()):
        raise InputError(
            f"attach: in the model's process group this is rank {group.rank()} of {group.size()}, for the {name} rank "
            f"{backend.rank} of {backend.size}; give both the same group: {name}(..., backend=model.process_group)"
        )
    hook = AveragingHook(group, optimizer)
    ddp.register_comm_hook(hook, lambda state, bucket: state.average(bucket))
    optimizer.averager = hook


def compress_gradients(
    model: torch.nn.Module, codec: Codec | None = None, *, bucket_mb: float | None = None
) -> CompressedHook:
    """Have DDP average gradients compressed, with error feedback, for an optimizer of any kind.

    Args:
        model, codec, bucket_mb: see `CompressedHook`; the model has no communication hook yet.

    Returns:
        The hook, which has the error feedback to save and the counts of bytes.

    Raises:
        InputError: the model is of another kind or has a hook, or an option is out of range; nothing was changed.
    """
    hook = CompressedHook(_without_hook(model, "compress_gradients"), codec, bucket_mb=bucket_mb)
    hook.model.register_comm_hook(hook, lambda state, bucket: state.average(bucket))
    return hook


def unattached(optimizer: AveragingOptimizer) -> InputError | None:
    """Why an optimizer must not average, as DDP does already; None: it may."""
    if optimizer.averager is not None or not dist.is_available() or not dist.is_initialized():
        return None
    held = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if not _in_ddp(held):
        return None
    gc.collect()  # a wrapper that nobody uses any more averages nothing
    if not _in_ddp(held):
        return None
    name = type(optimizer).__name__
    return InputError(
        f"rank {dist.get_rank()}: {name}: its parameters are in a DistributedDataParallel model, which would average "
        "their gradients a second time; after both are made, and instead of any other communication hook, call "
        "onebit.comm.ddp.attach(model, optimizer), or leave the model unwrapped"
    )


def _in_ddp(params: set[Any]) -> bool:
    """Whether a DDP model averages gradients of some of these parameters."""
    # There are hundreds of thousands of objects, and issubclass() takes its time with a class that has ABCMeta.
    models: list[Any] = [found for found in gc.get_objects() if DistributedDataParallel in type(found).__mro__]
    return any(p in params for model in models if hasattr(model, "reducer") for p in model.parameters())


def _without_hook(model: Any, call: str) -> DistributedDataParallel:
    """The DDP model itself, if it has no communication hook."""
    ddp = getattr(model, "_orig_mod", model)  # where torch.compile keeps it
    if not isinstance(ddp, DistributedDataParallel):
        raise InputError(
            f"{call} takes a DistributedDataParallel model, got {type(model).__name__}; after "
            "torch.distributed.init_process_group() wrap it, model = DistributedDataParallel(model), and give that; "
            "where Accelerate, the Trainer or Lightning wraps the model, call it once they have"
        )
    if ddp._comm_hooks:
        raise InputError(
            f"{call}: this model has a communication hook already, and DDP takes one; wrap the model anew in "
            "DistributedDataParallel and call one of attach, compress_gradients and register_comm_hook, once"
        )
    return ddp


def _check_parameters(model: DistributedDataParallel, optimizer: AveragingOptimizer) -> None:
    """Raise InputError unless the optimizer holds what the model trains, and trains nothing else."""
    names = {p: name for name, p in model.module.named_parameters()}
    held = {p for group in optimizer.param_groups for p in group["params"]}
    kind = type(optimizer).__name__
    for p, name in names.items():
        if p.requires_grad and p not in held and name not in model.parameters_to_ignore:
            raise InputError(
                f"attach: the {kind} does not hold the model's parameter {name!r}, whose gradient nobody would average "
                "in a compressed step; make one optimizer over model.parameters(), with groups where options differ, "
                "or set requires_grad=False before the model is wrapped"
            )
    others = [p for p in held if p.requires_grad and (p not in names or names[p] in model.parameters_to_ignore)]
    if others:
        shapes = ", ".join(sorted(str(tuple(p.shape)) for p in others)[:3])
        raise InputError(
            f"attach: the {kind} holds {len(others)} parameters that DDP does not average, of shapes {shapes}; give it "
            "those of this model alone, made after the model has its final parameters"
        )
