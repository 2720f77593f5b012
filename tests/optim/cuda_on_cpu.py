"""Runs kernels of a `.cu` file on the CPU, thread after thread, so that what they compute can be tested without a GPU.

For kernels whose threads do not talk to each other. Instructions that C++ does not have are replaced by what they mean.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from onebit.compress.gpu.module import THREADS, with_headers

COMPILER = shutil.which("g++")

PROLOGUE = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
using std::isfinite; using std::isinf; using std::max; using std::min;
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
struct Index { unsigned x; };
static Index blockIdx, blockDim, gridDim, threadIdx;
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(8) int2 { int x, y; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
typedef unsigned short half;
static ushort4 make_ushort4(half x, half y, half z, half w) { return {x, y, z, w}; }
template <class To, class From> static To same_bits(From from) { To to; memcpy(&to, &from, sizeof to); return to; }
static float __uint_as_float(unsigned word) { return same_bits<float>(word); }
static unsigned __float_as_uint(float number) { return same_bits<unsigned>(number); }
template <class T> static void __stcs(T* at, T value) { *at = value; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static float __fsqrt_rn(float a) { return std::sqrt(a); }
template <class T> static T __shfl_xor_sync(unsigned, T, int) { abort(); }
static float cvt_f32_f16(half bits) { return (float)same_bits<_Float16>(bits); }
static half cvt_rn_f16_f32(float number) { return same_bits<half>((_Float16)number); }
static unsigned cvt_rn_f16x2_f32(float high, float low) { return cvt_rn_f16_f32(high) << 16 | cvt_rn_f16_f32(low); }
static unsigned bfloat(float a) {
    unsigned word = same_bits<unsigned>(a);
    return a != a ? 0x7FFF : (word + 0x7FFF + (word >> 16 & 1)) >> 16;
}
static unsigned cvt_rn_bf16x2_f32(float high, float low) { return bfloat(high) << 16 | bfloat(low); }
static float max_NaN_f32(float a, float b) { return a != a || b != b ? same_bits<float>(0x7FFFFFFFu) : std::max(a, b); }
static unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned taken = 0;
    for (int k = 0; k < 4; k++) taken |= unsigned(both >> 8 * (selector >> 4 * k & 7) & 0xFF) << 8 * k;
    return taken;
}
static float sqrt_approx_f32(float a) { return std::sqrt(a); }
static float div_approx_f32(float a, float b) { return a / b; }
"""

EPILOGUE = """
typedef long long word;
extern "C" void run(void* kernel, unsigned blocks, const word* a, int arguments) {
    gridDim.x = blocks;
    blockDim.x = THREADS;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)
            if (arguments == 6)
                ((void (*)(word, word, word, word, word, word))kernel)(a[0], a[1], a[2], a[3], a[4], a[5]);
            else if (arguments == 8)
                ((void (*)(word, word, word, word, word, word, word, word))kernel)(
                    a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
            else
                abort();
}
"""


def launch(file: Path, kernel: str, device: torch.device, threads: int, *arguments: int) -> None:
    """As `onebit.compress.gpu.module.launch`, on CPU tensors."""
    assert device.type == "cpu"
    compiled = library(file)
    words = (ctypes.c_longlong * len(arguments))(*arguments)
    compiled.run(ctypes.cast(getattr(compiled, kernel), ctypes.c_void_p), -(-threads // THREADS), words, len(arguments))


@functools.cache
def library(file: Path, prologue: str = PROLOGUE, epilogue: str = EPILOGUE) -> ctypes.CDLL:
    """A `.cu` file, compiled as C++ between two pieces of it."""
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        code = re.sub(r'asm volatile\("prefetch[^"]*" ::"l"\(\w+\)\);', "", with_headers(file))  # as if it had come
        code = re.sub(r'asm\("([\w.]+) [^"]*"\s+: ("=.*?)\s+: (.*?)\);', _call, code)
        source.write_text(prologue + code + epilogue)
        options = [
            "-std=c++17",
            "-O1",
            "-march=native",
            "-ffp-contract=off",
            "-fsanitize=alignment",  # a vector at an address that does not suit it is a fault, as on a GPU
            "-fsanitize-undefined-trap-on-error",
            "-fno-strict-aliasing",
            "-fPIC",
            "-shared",
        ]
        command = [COMPILER, *options, f"-DTHREADS={THREADS}", "-o", str(built), str(source)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert run.returncode == 0, run.stderr
        return ctypes.CDLL(str(built))


def _call(instruction: re.Match[str]) -> str:
    results, arguments = (re.findall(r'"=?\w"\(([^)]*)\)', operands) for operands in instruction.groups()[1:])
    call = instruction[1].replace(".", "_")
    if len(results) == 1:
        return f"{results[0]} = {call}({', '.join(arguments)});"
    return f"{call}({', '.join(results + arguments)});"  # which takes its results by reference
