"""As `cuda_on_cpu`, for kernels whose 32 lanes talk to each other: each lane of a warp is a context of its own."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from onebit.compress.gpu import operators
from onebit.compress.gpu.module import THREADS
from onebit.optim.gpu import local, momentum
from tests.optim import cuda_on_cpu

COMPILER = cuda_on_cpu.COMPILER
MOST_ARGUMENTS = 26
FOLDER = Path(operators.__file__).parent
ALONE = "template <class T> static T __shfl_xor_sync(unsigned, T, int) { abort(); }\n"

# A lane that reaches an exchange gives way until all lanes have; then it reads, and gives way until all have read.
EXCHANGES = """
#include <ucontext.h>
static ucontext_t scheduler, lanes[32];
static unsigned long long given[32];
static bool over[32];
static void give_way() { swapcontext(&lanes[threadIdx.x % 32], &scheduler); }
template <class T> static T __shfl_xor_sync(unsigned, T value, int step) {
    memcpy(&given[threadIdx.x % 32], &value, sizeof value);
    give_way();
    T taken;
    memcpy(&taken, &given[threadIdx.x % 32 ^ step], sizeof taken);
    give_way();
    return taken;
}
static unsigned __ballot_sync(unsigned, bool vote) {
    given[threadIdx.x % 32] = vote;
    give_way();
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++) votes |= unsigned(given[lane] != 0) << lane;
    give_way();
    return votes;
}
static unsigned __reduce_max_sync(unsigned, unsigned value) {
    given[threadIdx.x % 32] = value;
    give_way();
    unsigned most = 0;
    for (int lane = 0; lane < 32; lane++) most = max(most, unsigned(given[lane]));
    give_way();
    return most;
}
static bool __all_sync(unsigned all, bool vote) { return __ballot_sync(all, vote) == all; }
static int __popc(unsigned word) { return __builtin_popcount(word); }
static double __longlong_as_double(long long word) { return same_bits<double>(word); }
// Off by one unit in the last place, as the instructions may be.
static float rsqrt_approx_ftz_f32(float a) { return std::nextafter(1 / std::sqrt(a), 0.0f); }
static float rcp_approx_ftz_f32(float a) { return std::nextafter(1 / a, 0.0f); }
"""

# Who holds which number of a matrix is as PTX says of mma.m16n8k16.
MATRICES = """
static unsigned pair_of(float first, float second) { return cvt_rn_f16x2_f32(second, first); }
static float number_of(unsigned pair, int k) { return cvt_f32_f16(half(pair >> 16 * k)); }
static unsigned sub_rn_f16x2(unsigned a, unsigned b) {
    return pair_of(number_of(a, 0) - number_of(b, 0), number_of(a, 1) - number_of(b, 1));
}
static unsigned fma_rn_f16x2(unsigned a, unsigned b, unsigned c) {  // in fp32, where a product of fp16 is exact
    float sums[2];
    for (int k = 0; k < 2; k++) sums[k] = std::fma(number_of(a, k), number_of(b, k), number_of(c, k));
    return pair_of(sums[0], sums[1]);
}
static unsigned matrices[32][6];
static float product_at(int row, int column) {
    double sum = 0;
    for (int k = 0; k < 16; k++) {
        unsigned a = matrices[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
        unsigned b = matrices[column * 4 + k % 8 / 2][4 + k / 8];
        sum += double(number_of(a, k % 2)) * number_of(b, k % 2);
    }
    return float(sum);
}
static void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    float& d0, float& d1, float& d2, float& d3,
    unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, float) {
    int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
    unsigned held[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(matrices[lane], held, sizeof held);
    give_way();
    float product[4];
    for (int i = 0; i < 4; i++) product[i] = product_at(row + i / 2 * 8, column + i % 2);
    give_way();
    d0 = product[0]; d1 = product[1]; d2 = product[2]; d3 = product[3];
}
static void mma_sync_aligned_m16n8k16_row_col_f16_f16_f16_f16(
    unsigned& d0, unsigned& d1,
    unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, unsigned) {
    float d[4];
    mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(d[0], d[1], d[2], d[3], a0, a1, a2, a3, b0, b1, 0.0f);
    d0 = pair_of(d[0], d[1]);
    d1 = pair_of(d[2], d[3]);
}
"""

EPILOGUE = f"""
#define ARGUMENTS(a) {", ".join(f"a({i})" for i in range(MOST_ARGUMENTS))}
#define TYPE(i) long long
#define VALUE(i) words[i]
static void (*kernel)(ARGUMENTS(TYPE));
static const long long* words;
static void lane_body() {{
    kernel(ARGUMENTS(VALUE));
    over[threadIdx.x % 32] = true;
    give_way();
}}
extern "C" void run_warps(void* function, unsigned n, const long long* given_words) {{
    static char stacks[32][1 << 17];
    kernel = (decltype(kernel))function;
    words = given_words;
    gridDim.x = n;
    blockDim.x = THREADS;
    for (blockIdx.x = 0; blockIdx.x < n; blockIdx.x++)
        for (unsigned first = 0; first < THREADS; first += 32) {{
            for (int lane = 0; lane < 32; lane++) {{
                over[lane] = false;
                getcontext(&lanes[lane]);
                lanes[lane].uc_stack.ss_sp = stacks[lane];
                lanes[lane].uc_stack.ss_size = sizeof stacks[lane];
                makecontext(&lanes[lane], lane_body, 0);
            }}
            for (bool left = true; left;) {{
                left = false;
                for (int lane = 0; lane < 32; lane++)
                    if (!over[lane]) {{
                        threadIdx.x = first + lane;
                        swapcontext(&scheduler, &lanes[lane]);
                        left |= !over[lane];
                    }}
            }}
        }}
}}
"""


def launch(file: str | Path, kernel: str, device: torch.device, threads: int, *arguments: int) -> None:
    """As `onebit.compress.gpu.module.launch`, on CPU tensors."""
    assert device.type == "cpu"
    assert all(isinstance(argument, int) for argument in arguments), arguments
    prologue = cuda_on_cpu.PROLOGUE.replace(ALONE, EXCHANGES)
    assert prologue != cuda_on_cpu.PROLOGUE
    compiled = cuda_on_cpu.library(FOLDER / file, prologue + MATRICES, EPILOGUE)
    words = (ctypes.c_longlong * MOST_ARGUMENTS)(*arguments)
    compiled.run_warps(ctypes.cast(getattr(compiled, kernel), ctypes.c_void_p), -(-threads // THREADS), words)


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU modules launch runs on CPU tensors."""
    for module in (operators, momentum, local):
        monkeypatch.setattr(module, "launch", launch)
