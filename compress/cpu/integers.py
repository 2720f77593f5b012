"""Vectors of 32 unsigned words of 32 bits for Numba: integers in lanes, and their way to and from bytes and nibbles."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from onebit.compress.cpu.intrinsic import (
    F32,
    I8,
    I32,
    LANES,
    broadcast,
    constant,
    f32x32,
    lanewise,
    load,
    operation,
    pick,
    store,
    u32x32,
    vector,
)


@operation(u32x32, f32x32)
def bits_of(builder: Any, a: Any) -> Any:
    """The bits of each fp32 lane."""
    return builder.bitcast(a, vector(I32))


@operation(f32x32, u32x32)
def as_floats(builder: Any, a: Any) -> Any:
    """The fp32 numbers that have these bits."""
    return builder.bitcast(a, vector(F32))


@operation(f32x32, u32x32)
def to_floats(builder: Any, a: Any) -> Any:
    """The numbers, read as signed ones, in fp32."""
    return builder.sitofp(a, vector(F32))


@operation(u32x32, types.uint32)
def splat(builder: Any, scalar: Any) -> Any:
    """The word in every lane."""
    return broadcast(builder, scalar)


@operation(u32x32)
def lane_numbers(builder: Any) -> Any:
    """0, 1, ..., 31."""
    return ir.Constant(vector(I32), list(range(LANES)))


# Modulo 2³².
add = lanewise(u32x32, "add")
subtract = lanewise(u32x32, "sub")
multiply = lanewise(u32x32, "mul")

bit_and = lanewise(u32x32, "and_")
bit_or = lanewise(u32x32, "or_")
bit_xor = lanewise(u32x32, "xor")


@operation(u32x32, u32x32, types.uint32)
def shift_right(builder: Any, a: Any, count: Any) -> Any:
    """Every lane shifted right by `count` < 32, zeros from the left."""
    return builder.lshr(a, broadcast(builder, count))


@operation(u32x32, u32x32, types.uint32)
def shift_left(builder: Any, a: Any, count: Any) -> Any:
    """Every lane shifted left by `count` < 32."""
    return builder.shl(a, broadcast(builder, count))


@operation(u32x32, u32x32, u32x32)
def larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger one, lane by lane."""
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


@operation(types.uint32, u32x32)
def largest(builder: Any, a: Any) -> Any:
    """The largest of the 32 lanes."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = pick(builder, a, a, list(range(width))), pick(builder, a, a, list(range(width, 2 * width)))
        a = builder.select(builder.icmp_unsigned(">", low, high), low, high)
    return builder.extract_element(a, ir.Constant(I32, 0))


@operation(types.uint32, u32x32, u32x32)
def less(builder: Any, a: Any, b: Any) -> Any:
    """Bit i is a[i] < b[i]."""
    return builder.bitcast(builder.icmp_unsigned("<", a, b), I32)


@operation(u32x32, types.int64)
def load_u8(builder: Any, address: Any) -> Any:
    """Load 32 bytes, each the low byte of a lane."""
    return builder.zext(load(builder, address, vector(I8), 1), vector(I32))


@operation(u32x32, types.int64)
def load_i8(builder: Any, address: Any) -> Any:
    """Load 32 bytes in two's complement."""
    return builder.sext(load(builder, address, vector(I8), 1), vector(I32))


@operation(types.void, types.int64, u32x32)
def store_8(builder: Any, address: Any, a: Any) -> Any:
    """Store the low byte of every lane."""
    store(builder, address, builder.trunc(a, vector(I8)), 1)


@operation(u32x32, types.int64)
def load_i4(builder: Any, address: Any) -> Any:
    """Load 32 nibbles in two's complement from 16 bytes; lane 2k is in the low half of byte k."""
    pairs = load(builder, address, vector(I8, 16), 1)
    low = builder.and_(pairs, constant(0xF, I8, 16))
    high = builder.lshr(pairs, constant(4, I8, 16))
    nibbles = pick(builder, low, high, [lane // 2 + 16 * (lane % 2) for lane in range(LANES)])
    sign = constant(0x8, I8)
    return builder.sext(builder.sub(builder.xor(nibbles, sign), sign), vector(I32))


@operation(types.void, types.int64, u32x32)
def store_4(builder: Any, address: Any, a: Any) -> Any:
    """Store the low nibble of every lane in 16 bytes; lane 2k goes to the low half of byte k."""
    even, odd = (pick(builder, a, a, list(range(first, LANES, 2))) for first in (0, 1))
    low = builder.and_(even, constant(0xF, I32, 16))
    pairs = builder.or_(low, builder.shl(odd, constant(4, I32, 16)))
    store(builder, address, builder.trunc(pairs, vector(I8, 16)), 1)
