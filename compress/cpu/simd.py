"""Vectors of 32 lanes for Numba: a comparison of 32 floats becomes one 32-bit word, as in a warp of a GPU.

Every operation is a few instructions of LLVM's vector IR, so the kernels built from them run as fast on AVX2, AVX-512
or NEON as the target allows. Addresses are int64; alignment is not required unless said.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from onebit.compress.cpu.intrinsic import (
    F16,
    F32,
    I1,
    I16,
    I32,
    I64,
    LANES,
    broadcast,
    constant,
    f32x32,
    lanewise,
    load,
    operation,
    pick,
    store,
    u16x32,
    vector,
)


@operation(f32x32, types.int64)
def load_f32(builder: Any, address: Any) -> Any:
    """Load 32 fp32 values."""
    return load(builder, address, vector(F32), 4)


@operation(f32x32, types.int64)
def load_bf16(builder: Any, address: Any) -> Any:
    """Load 32 bf16 values; exact in fp32."""
    wide = builder.zext(load(builder, address, vector(I16), 2), vector(I32))
    return builder.bitcast(builder.shl(wide, constant(16, I32)), vector(F32))


@operation(f32x32, types.int64)
def load_f16(builder: Any, address: Any) -> Any:
    """Load 32 fp16 values; exact in fp32."""
    return builder.fpext(load(builder, address, vector(F16), 2), vector(F32))


@operation(types.float32, types.int64)
def get_f32(builder: Any, address: Any) -> Any:
    """Load one fp32 value."""
    return load(builder, address, F32, 4)


@operation(types.float32, types.int64)
def get_bf16(builder: Any, address: Any) -> Any:
    """Load one bf16 value; exact in fp32."""
    wide = builder.zext(load(builder, address, I16, 2), I32)
    return builder.bitcast(builder.shl(wide, ir.Constant(I32, 16)), F32)


@operation(types.float32, types.int64)
def get_f16(builder: Any, address: Any) -> Any:
    """Load one fp16 value; exact in fp32."""
    return builder.fpext(load(builder, address, F16, 2), F32)


@operation(types.uint32, types.int64)
def get_word(builder: Any, address: Any) -> Any:
    """Load 32 bits."""
    return load(builder, address, I32, 1)


@operation(types.int64, types.int64, types.int64)
def get_i32_at(builder: Any, table: Any, index: Any) -> Any:
    """Entry `index` of a table of int32."""
    address = builder.add(table, builder.mul(index, ir.Constant(I64, 4)))
    return builder.sext(load(builder, address, I32, 4), I64)


@operation(types.int64, types.int64, types.int64)
def get_i64_at(builder: Any, table: Any, index: Any) -> Any:
    """Entry `index` of a table of int64."""
    return load(builder, builder.add(table, builder.mul(index, ir.Constant(I64, 8))), I64, 8)


@operation(types.void, types.int64, f32x32)
def store_f32(builder: Any, address: Any, vector: Any) -> Any:
    """Store 32 fp32 values."""
    store(builder, address, vector, 4)


@operation(types.void, types.int64, f32x32)
def stream_f32(builder: Any, address: Any, vector: Any) -> Any:
    """Store 32 fp32 values past the cache, so that the old line is not read; the address is a multiple of 64."""
    _no_cache(builder, store(builder, address, vector, 64))


@operation(types.void, types.int64, u16x32)
def store_u16(builder: Any, address: Any, vector: Any) -> Any:
    """Store 32 16-bit values."""
    store(builder, address, vector, 2)


@operation(types.void, types.int64, u16x32)
def stream_u16(builder: Any, address: Any, vector: Any) -> Any:
    """Store 32 16-bit values past the cache; the address is a multiple of 64."""
    _no_cache(builder, store(builder, address, vector, 64))


def _no_cache(builder: Any, instruction: Any) -> None:
    instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


@operation(types.void, types.int64, types.float32)
def put_f32(builder: Any, address: Any, value: Any) -> Any:
    """Store one fp32 value."""
    store(builder, address, value, 4)


@operation(types.void, types.int64, types.uint16)
def put_u16(builder: Any, address: Any, value: Any) -> Any:
    """Store 16 bits."""
    store(builder, address, value, 2)


@operation(types.void, types.int64, types.uint32)
def put_word(builder: Any, address: Any, value: Any) -> Any:
    """Store 32 bits."""
    store(builder, address, value, 1)


@operation(types.void, types.int64, types.int64)
def copy_byte(builder: Any, target: Any, source: Any) -> Any:
    """Copy one byte."""
    store(builder, target, load(builder, source, ir.IntType(8), 1), 1)


@operation(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> Any:
    """Ask for the line of 64 bytes at an address that will soon be read; any address will do."""
    kind = ir.IntType(8).as_pointer()
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", [kind], ir.FunctionType(ir.VoidType(), [kind, I32, I32, I32])
    )
    read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    builder.call(function, [builder.inttoptr(address, kind), read, keep, data])


@operation(types.void)
def fence(builder: Any) -> Any:
    """Order everything before, streamed stores included, before everything after."""
    builder.fence("seq_cst")


# Each lane is rounded once.
add = lanewise(f32x32, "fadd")
subtract = lanewise(f32x32, "fsub")
multiply = lanewise(f32x32, "fmul")
divide = lanewise(f32x32, "fdiv")


@operation(f32x32, f32x32)
def square_root(builder: Any, a: Any) -> Any:
    """The root of each lane, rounded once; NaN for a negative one."""
    kind = ir.FunctionType(a.type, [a.type])
    return builder.call(builder.module.declare_intrinsic(f"llvm.sqrt.v{LANES}f32", fnty=kind), [a])


@operation(f32x32, f32x32)
def absolute(builder: Any, a: Any) -> Any:
    """|a|."""
    words = builder.bitcast(a, vector(I32))
    return builder.bitcast(builder.and_(words, constant(0x7FFFFFFF, I32)), vector(F32))


@operation(f32x32, f32x32)
def floor(builder: Any, a: Any) -> Any:
    """The largest integer that is not above, lane by lane."""
    kind = ir.FunctionType(a.type, [a.type])
    return builder.call(builder.module.declare_intrinsic(f"llvm.floor.v{LANES}f32", fnty=kind), [a])


@operation(f32x32, f32x32, types.float32, types.float32)
def clamp(builder: Any, a: Any, low: Any, high: Any) -> Any:
    """`a` within [low, high]; NaN becomes `low`."""
    bottom, top = broadcast(builder, low), broadcast(builder, high)
    a = builder.select(builder.fcmp_ordered(">", a, bottom), a, bottom)
    return builder.select(builder.fcmp_ordered("<", a, top), a, top)


@operation(types.uint32, f32x32, f32x32)
def less(builder: Any, a: Any, b: Any) -> Any:
    """Bit i is a[i] < b[i]; clear where one is NaN."""
    return builder.bitcast(builder.fcmp_ordered("<", a, b), I32)


@operation(types.uint32, f32x32, f32x32)
def equal(builder: Any, a: Any, b: Any) -> Any:
    """Bit i is a[i] == b[i]: set for a zero and the other one, clear where one is NaN."""
    return builder.bitcast(builder.fcmp_ordered("==", a, b), I32)


@operation(f32x32, types.float32)
def splat(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    return broadcast(builder, scalar)


@operation(u16x32, types.uint16)
def splat_u16(builder: Any, scalar: Any) -> Any:
    """The 16 bits in every lane."""
    return broadcast(builder, scalar)


@operation(types.uint32, f32x32)
def signs(builder: Any, a: Any) -> Any:
    """Bit i is a[i] >= 0: set for both zeros, clear for NaN."""
    return builder.bitcast(builder.fcmp_ordered(">=", a, constant(0.0, F32)), I32)


@operation(f32x32, types.uint32, f32x32, f32x32)
def select(builder: Any, word: Any, a: Any, b: Any) -> Any:
    """Lane i of `a` where bit i is set, of `b` where it is not."""
    return builder.select(builder.bitcast(word, vector(I1)), a, b)


@operation(u16x32, types.uint32, u16x32, u16x32)
def select_u16(builder: Any, word: Any, a: Any, b: Any) -> Any:
    """Lane i of `a` where bit i is set, of `b` where it is not."""
    return builder.select(builder.bitcast(word, vector(I1)), a, b)


@operation(types.int64, types.uint32)
def count_ones(builder: Any, word: Any) -> Any:
    """Number of set bits."""
    return builder.zext(builder.ctpop(word), I64)


@operation(types.uint16, types.float32)
def to_f16(builder: Any, value: Any) -> Any:
    """The bits of `value` in fp16, to nearest, ties to even."""
    return builder.bitcast(builder.fptrunc(value, F16), I16)


@operation(u16x32, f32x32)
def to_bf16_lanes(builder: Any, a: Any) -> Any:
    """The bits of each lane in bf16, to nearest, ties to even; NaN stays NaN."""
    words = builder.bitcast(a, vector(I32))
    high = builder.lshr(words, constant(16, I32))
    tie = builder.and_(high, constant(1, I32))
    rounded = builder.lshr(builder.add(builder.add(words, constant(0x7FFF, I32)), tie), constant(16, I32))
    quiet = builder.or_(high, constant(0x0040, I32))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", a, a), quiet, rounded), vector(I16))


@operation(u16x32, f32x32)
def to_f16_lanes(builder: Any, a: Any) -> Any:
    """The bits of each lane in fp16, to nearest, ties to even."""
    return builder.bitcast(builder.fptrunc(a, vector(F16)), vector(I16))


@operation(types.uint32, types.float32)
def bits_of(builder: Any, value: Any) -> Any:
    """The 32 bits of an fp32 value."""
    return builder.bitcast(value, I32)


@operation(types.float32, types.uint32)
def float_of(builder: Any, word: Any) -> Any:
    """The fp32 value that has these bits."""
    return builder.bitcast(word, F32)


@operation(types.float32, f32x32, f32x32, f32x32, f32x32)
def fold(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sum 128 lanes in the order of `reference.ordered_sum`: pairs of neighbours twice, then halves."""
    low = pick(builder, a, b, list(range(64)))
    high = pick(builder, c, d, list(range(64)))
    for width in (64, 32):  # two rounds of neighbours: 128 -> 64 -> 32 lanes, in two registers each
        pairs = builder.fadd(
            pick(builder, low, high, list(range(0, 2 * width, 2))),
            pick(builder, low, high, list(range(1, 2 * width, 2))),
        )
        low = pick(builder, pairs, pairs, list(range(width // 2)))
        high = pick(builder, pairs, pairs, list(range(width // 2, width)))
    total = builder.fadd(low, high)
    width = 16
    while width > 1:
        width //= 2
        total = builder.fadd(
            pick(builder, total, total, list(range(width))),
            pick(builder, total, total, list(range(width, 2 * width))),
        )
    return builder.extract_element(total, ir.Constant(I32, 0))
