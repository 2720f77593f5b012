"""What a broadcast is given: the tensors by name, whether each can be overwritten, and what ranks compare of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onebit.comm.tensors import Tensors, as_list, describe, shared_places
from onebit.compress.errors import InputError


def named_tensors(given: Tensors | nn.Module) -> dict[str, Tensor]:
    """Name to plain tensor, which shares memory with the given one; the same order wherever the names are the same.

    Raises:
        InputError: neither a module nor tensors, or a parameter without values.
    """
    if not isinstance(given, nn.Module):
        try:
            return {f"tensor {index}": tensor for index, tensor in enumerate(as_list(given))}
        except InputError as error:
            raise InputError(f"{error}; pass these or a torch.nn.Module") from error
    kinds = {"parameter": given.named_parameters(), "buffer": given.named_buffers()}
    named = {f"{kind} {name}": tensor for kind, members in kinds.items() for name, tensor in members}
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise InputError(f"{name} has no values yet, as its module is lazy; call the model once before")
    return {name: named[name].detach() for name in sorted(named)}


def refusal_of(named: Mapping[str, Tensor]) -> InputError | None:
    """Why the first of these tensors that cannot be overwritten bit by bit cannot; None: all can."""
    for name, tensor in named.items():
        reason = _reason(tensor)
        if reason is not None:
            return InputError(f"{name} {reason}")
    return None


def described(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Name to dtype, shape and, of a tensor that begins in another's memory, where in it and with which strides."""
    said = {name: describe(tensor) for name, tensor in named.items()}
    filled = [(name, tensor) for name, tensor in named.items() if tensor.numel()]
    holder, held = "", range(0)
    on = None
    for name, tensor in sorted(filled, key=lambda item: (str(item[1].device), item[1].data_ptr())):
        own = _addresses(tensor)
        if tensor.device == on and own.start in held:
            said[name] += f" with strides {tensor.stride()} from byte {own.start - held.start} of {holder}"
        if tensor.device != on or own.stop > held.stop:
            holder, held, on = name, own, tensor.device
    return said


def _addresses(tensor: Tensor) -> range:
    """From its first byte to behind its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return range(start, start + (reach + 1) * tensor.element_size())


def _reason(tensor: Tensor) -> str | None:
    if hasattr(tensor, "__tensor_flatten__"):
        return (
            f"is a {type(tensor).__name__}, which stands for other tensors; send these, as to_local() gives them, "
            "over a group of ranks that hold the same, or send the model before it is sharded or converted"
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else f"{tensor.layout}"
        return f"must be a dense tensor, got a {kind} one; convert it first"
    if tensor.is_meta:
        return "is on meta and has no values; give it some first, as torch.nn.Module.to_empty does"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in torch.inference_mode and can be overwritten in that mode only; send a clone()"
    return shared_places(tensor)
