"""Vectors of 32 lanes for Numba: a comparison of 32 floats becomes one 32-bit word, as in a warp of a GPU.

Every operation is a few instructions of LLVM's vector IR, so the kernels built from them run as fast on AVX2, AVX-512
or NEON as the target allows. Addresses are int64; alignment is not required unless said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

LANES = 32

_I1, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()


def _vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
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


f32x32 = _F32x32("f32x32", _vector(_F32))
u16x32 = _U16x32("u16x32", _vector(_I16))


@register_model(_F32x32)
@register_model(_U16x32)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


def _operation(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
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


def _constant(value: float, element: ir.Type, lanes: int = LANES) -> ir.Constant:
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _load(builder: Any, address: Any, kind: ir.Type, alignment: int) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = alignment
    return value


def _store(builder: Any, address: Any, value: Any, alignment: int) -> Any:
    instruction = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    instruction.align = alignment
    return instruction


def _pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(_vector(_I32, len(lanes)), lanes))


def _broadcast(builder: Any, scalar: Any) -> Any:
    kind = _vector(scalar.type)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return _pick(builder, first, first, [0] * LANES)


@_operation(f32x32, types.int64)
def load_f32(builder: Any, address: Any) -> Any:
    """Load 32 fp32 values."""
    return _load(builder, address, _vector(_F32), 4)


@_operation(f32x32, types.int64)
def load_bf16(builder: Any, address: Any) -> Any:
    """Load 32 bf16 values; exact in fp32."""
    wide = builder.zext(_load(builder, address, _vector(_I16), 2), _vector(_I32))
    return builder.bitcast(builder.shl(wide, _constant(16, _I32)), _vector(_F32))


@_operation(f32x32, types.int64)
def load_f16(builder: Any, address: Any) -> Any:
    """Load 32 fp16 values; exact in fp32."""
    return builder.fpext(_load(builder, address, _vector(_F16), 2), _vector(_F32))


@_operation(types.float32, types.int64)
def get_f32(builder: Any, address: Any) -> Any:
    """Load one fp32 value."""
    return _load(builder, address, _F32, 4)


@_operation(types.float32, types.int64)
def get_bf16(builder: Any, address: Any) -> Any:
    """Load one bf16 value; exact in fp32."""
    wide = builder.zext(_load(builder, address, _I16, 2), _I32)
    return builder.bitcast(builder.shl(wide, ir.Constant(_I32, 16)), _F32)


@_operation(types.float32, types.int64)
def get_f16(builder: Any, address: Any) -> Any:
    """Load one fp16 value; exact in fp32."""
    return builder.fpext(_load(builder, address, _F16, 2), _F32)


@_operation(types.uint32, types.int64)
def get_word(builder: Any, address: Any) -> Any:
    """Load 32 bits."""
    return _load(builder, address, _I32, 1)


@_operation(types.int64, types.int64, types.int64)
def get_i32_at(builder: Any, table: Any, index: Any) -> Any:
    """Entry `index` of a table of int32."""
    address = builder.add(table, builder.mul(index, ir.Constant(_I64, 4)))
    return builder.sext(_load(builder, address, _I32, 4), _I64)


@_operation(types.int64, types.int64, types.int64)
def get_i64_at(builder: Any, table: Any, index: Any) -> Any:
    """Entry `index` of a table of int64."""
    return _load(builder, builder.add(table, builder.mul(index, ir.Constant(_I64, 8))), _I64, 8)


@_operation(types.void, types.int64, f32x32)
def store_f32(builder: Any, address: Any, vector: Any) -> Any:
    """Store 32 fp32 values."""
    _store(builder, address, vector, 4)


@_operation(types.void, types.int64, f32x32)
def stream_f32(builder: Any, address: Any, vector: Any) -> Any:
    """Store 32 fp32 values past the cache, so that the old line is not read; the address is a multiple of 64."""
    _no_cache(builder, _store(builder, address, vector, 64))


@_operation(types.void, types.int64, u16x32)
def store_u16(builder: Any, address: Any, vector: Any) -> Any:
    """Store 32 16-bit values."""
    _store(builder, address, vector, 2)


@_operation(types.void, types.int64, u16x32)
def stream_u16(builder: Any, address: Any, vector: Any) -> Any:
    """Store 32 16-bit values past the cache; the address is a multiple of 64."""
    _no_cache(builder, _store(builder, address, vector, 64))


def _no_cache(builder: Any, instruction: Any) -> None:
    instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))


@_operation(types.void, types.int64, types.float32)
def put_f32(builder: Any, address: Any, value: Any) -> Any:
    """Store one fp32 value."""
    _store(builder, address, value, 4)


@_operation(types.void, types.int64, types.uint16)
def put_u16(builder: Any, address: Any, value: Any) -> Any:
    """Store 16 bits."""
    _store(builder, address, value, 2)


@_operation(types.void, types.int64, types.uint32)
def put_word(builder: Any, address: Any, value: Any) -> Any:
    """Store 32 bits."""
    _store(builder, address, value, 1)


@_operation(types.void, types.int64, types.int64)
def copy_byte(builder: Any, target: Any, source: Any) -> Any:
    """Copy one byte."""
    _store(builder, target, _load(builder, source, ir.IntType(8), 1), 1)


@_operation(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> Any:
    """Ask for the line of 64 bytes at an address that will soon be read; any address will do."""
    kind = ir.IntType(8).as_pointer()
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", [kind], ir.FunctionType(ir.VoidType(), [kind, _I32, _I32, _I32])
    )
    read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
    builder.call(function, [builder.inttoptr(address, kind), read, keep, data])


@_operation(types.void)
def fence(builder: Any) -> Any:
    """Order everything before, streamed stores included, before everything after."""
    builder.fence("seq_cst")


@_operation(f32x32, f32x32, f32x32)
def add(builder: Any, a: Any, b: Any) -> Any:
    """a + b, each lane rounded once."""
    return builder.fadd(a, b)


@_operation(f32x32, f32x32, f32x32)
def subtract(builder: Any, a: Any, b: Any) -> Any:
    """a - b, each lane rounded once."""
    return builder.fsub(a, b)


@_operation(f32x32, f32x32, f32x32)
def multiply(builder: Any, a: Any, b: Any) -> Any:
    """a · b, each lane rounded once."""
    return builder.fmul(a, b)


@_operation(f32x32, f32x32, f32x32)
def divide(builder: Any, a: Any, b: Any) -> Any:
    """a / b, each lane rounded once."""
    return builder.fdiv(a, b)


@_operation(f32x32, f32x32)
def square_root(builder: Any, a: Any) -> Any:
    """The root of each lane, rounded once; NaN for a negative one."""
    kind = ir.FunctionType(a.type, [a.type])
    return builder.call(builder.module.declare_intrinsic(f"llvm.sqrt.v{LANES}f32", fnty=kind), [a])


@_operation(f32x32, f32x32)
def absolute(builder: Any, a: Any) -> Any:
    """|a|."""
    words = builder.bitcast(a, _vector(_I32))
    return builder.bitcast(builder.and_(words, _constant(0x7FFFFFFF, _I32)), _vector(_F32))


@_operation(f32x32, types.float32)
def splat(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    return _broadcast(builder, scalar)


@_operation(u16x32, types.uint16)
def splat_u16(builder: Any, scalar: Any) -> Any:
    """The 16 bits in every lane."""
    return _broadcast(builder, scalar)


@_operation(types.uint32, f32x32)
def signs(builder: Any, a: Any) -> Any:
    """Bit i is a[i] >= 0: set for both zeros, clear for NaN."""
    return builder.bitcast(builder.fcmp_ordered(">=", a, _constant(0.0, _F32)), _I32)


@_operation(f32x32, types.uint32, f32x32, f32x32)
def select(builder: Any, word: Any, a: Any, b: Any) -> Any:
    """Lane i of `a` where bit i is set, of `b` where it is not."""
    return builder.select(builder.bitcast(word, _vector(_I1)), a, b)


@_operation(u16x32, types.uint32, u16x32, u16x32)
def select_u16(builder: Any, word: Any, a: Any, b: Any) -> Any:
    """Lane i of `a` where bit i is set, of `b` where it is not."""
    return builder.select(builder.bitcast(word, _vector(_I1)), a, b)


@_operation(types.int64, types.uint32)
def count_ones(builder: Any, word: Any) -> Any:
    """Number of set bits."""
    return builder.zext(builder.ctpop(word), _I64)


@_operation(types.uint16, types.float32)
def to_f16(builder: Any, value: Any) -> Any:
    """The bits of `value` in fp16, to nearest, ties to even."""
    return builder.bitcast(builder.fptrunc(value, _F16), _I16)


@_operation(u16x32, f32x32)
def to_bf16_lanes(builder: Any, a: Any) -> Any:
    """The bits of each lane in bf16, to nearest, ties to even; NaN stays NaN."""
    words = builder.bitcast(a, _vector(_I32))
    high = builder.lshr(words, _constant(16, _I32))
    tie = builder.and_(high, _constant(1, _I32))
    rounded = builder.lshr(builder.add(builder.add(words, _constant(0x7FFF, _I32)), tie), _constant(16, _I32))
    quiet = builder.or_(high, _constant(0x0040, _I32))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", a, a), quiet, rounded), _vector(_I16))


@_operation(u16x32, f32x32)
def to_f16_lanes(builder: Any, a: Any) -> Any:
    """The bits of each lane in fp16, to nearest, ties to even."""
    return builder.bitcast(builder.fptrunc(a, _vector(_F16)), _vector(_I16))


@_operation(types.uint32, types.float32)
def bits_of(builder: Any, value: Any) -> Any:
    """The 32 bits of an fp32 value."""
    return builder.bitcast(value, _I32)


@_operation(types.float32, f32x32, f32x32, f32x32, f32x32)
def fold(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sum 128 lanes in the order of `reference.ordered_sum`: pairs of neighbours twice, then halves."""
    low = _pick(builder, a, b, list(range(64)))
    high = _pick(builder, c, d, list(range(64)))
    for width in (64, 32):  # two rounds of neighbours: 128 -> 64 -> 32 lanes, in two registers each
        pairs = builder.fadd(
            _pick(builder, low, high, list(range(0, 2 * width, 2))),
            _pick(builder, low, high, list(range(1, 2 * width, 2))),
        )
        low = _pick(builder, pairs, pairs, list(range(width // 2)))
        high = _pick(builder, pairs, pairs, list(range(width // 2, width)))
    total = builder.fadd(low, high)
    width = 16
    while width > 1:
        width //= 2
        total = builder.fadd(
            _pick(builder, total, total, list(range(width))),
            _pick(builder, total, total, list(range(width, 2 * width))),
        )
    return builder.extract_element(total, ir.Constant(_I32, 0))
