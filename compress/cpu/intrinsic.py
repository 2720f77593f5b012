"""Numba intrinsics out of functions that emit LLVM's vector IR, and the types of vectors of 32 lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

LANES = 32

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """The LLVM type of a vector."""
    return ir.VectorType(element, lanes)


class _Vector(types.Type):
    """A Numba type whose values live in vector registers."""

    def __init__(self, name: str, llvm: ir.Type) -> None:
        super().__init__(name=name)
        self.llvm = llvm


class _F32x32(_Vector):
    pass


class _U16x32(_Vector):
    pass


class _U32x32(_Vector):
    pass


f32x32 = _F32x32("f32x32", vector(F32))
u16x32 = _U16x32("u16x32", vector(I16))
u32x32 = _U32x32("u32x32", vector(I32))


@register_model(_F32x32)
@register_model(_U16x32)
@register_model(_U32x32)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


def operation(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic with one signature out of a function that emits IR: `emit(builder, *llvm_values)`."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            value = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else value

        # Numba reads the number of parameters from the function, so one wrapper is needed per arity.
        signature = result(*arguments)
        wrappers = {
            1: lambda typing, a: (signature, generate),
            2: lambda typing, a, b: (signature, generate),
            3: lambda typing, a, b, c: (signature, generate),
            4: lambda typing, a, b, c, d: (signature, generate),
        }
        wrapper = wrappers[len(arguments)] if arguments else lambda typing: (signature, generate)
        wrapper.__name__ = wrapper.__qualname__ = emit.__name__
        wrapper.__doc__ = emit.__doc__
        return intrinsic(wrapper)

    return decorate


def lanewise(kind: types.Type, instruction: str) -> Any:
    """Make an intrinsic of one of LLVM's instructions, by its name in llvmlite: two vectors to one of the same kind."""

    def emit(builder: Any, a: Any, b: Any) -> Any:
        return getattr(builder, instruction)(a, b)

    return operation(kind, kind, kind)(emit)


def constant(value: float, element: ir.Type, lanes: int = LANES) -> ir.Constant:
    """A vector with the same value in every lane."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


def load(builder: Any, address: Any, kind: ir.Type, alignment: int) -> Any:
    """Emit a load from an int64 address."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = alignment
    return value


def store(builder: Any, address: Any, value: Any, alignment: int) -> Any:
    """Emit a store to an int64 address."""
    instruction = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    instruction.align = alignment
    return instruction


def pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Emit the vector of these lanes of `a` followed by `b`."""
    return builder.shuffle_vector(a, b, ir.Constant(vector(I32, len(lanes)), lanes))


def broadcast(builder: Any, scalar: Any) -> Any:
    """Emit a vector with the scalar in every lane."""
    kind = vector(scalar.type)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return pick(builder, first, first, [0] * LANES)
