"""Runs every CUDA kernel on small inputs and prints their names, for `.ci/sanitize`."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

from onebit.compress import Codec, Fp8Codec, Int4Codec, Int8Codec, SignCodec, pack_signs, unpack_signs
from onebit.compress.gpu import module
from onebit.optim import FusedAdam

sys.path.insert(0, str(Path(__file__).parent.parent))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [5000, 1, 33, 2048]


def codec_kernels() -> None:
    """encode, reduce_encode and decode of every kind of block; packing of signs."""
    for block_size, dtype, masked in itertools.product((1024, 96, 2048, None), DTYPES, (False, True)):
        _all_operators(SignCodec(block_size=block_size), dtype, masked)
    for dtype in DTYPES:
        unpack_signs(
            pack_signs(torch.randn(777, device="cuda").to(dtype)), torch.empty(777, dtype=dtype, device="cuda")
        )


def quantized_kernels() -> None:
    """The same of the quantizing codecs, with error feedback and without."""
    codecs: list[Codec] = []
    for block_size, feedback in itertools.product((1024, 256, 2048), (True, False)):
        options: dict[str, Any] = {"block_size": block_size, "error_feedback": feedback}
        codecs.append(Fp8Codec(**options))
        for codec, rotate in itertools.product((Int8Codec, Int4Codec), (False, True)):
            codecs.append(codec(rounding="stochastic" if feedback else "nearest", rotate=rotate, **options))
    for codec, dtype, masked in itertools.product(codecs, DTYPES, (False, True)):
        _all_operators(codec, dtype, masked)


def _all_operators(codec: Codec, dtype: torch.dtype, masked: bool) -> None:
    (layout,) = codec.plan(SIZES, 2)
    mask = torch.full((layout.padded_numel // 8,), 0x11, dtype=torch.uint8, device="cuda") if masked else None
    x = [torch.randn(n, device="cuda").to(dtype) for n in SIZES]
    residual, server = torch.zeros(layout.padded_numel, device="cuda"), torch.zeros(layout.chunk_numel, device="cuda")
    feedback = codec.error_feedback
    payload = codec.encode(x, residual if feedback else None, layout=layout, mask=mask)
    for ranks in (2, 4, 8, 3):  # of these numbers but the last some have kernels of their own
        payloads = payload.view(2, -1)[:1].repeat(ranks, 1)
        mean = codec.reduce_encode(payloads, server if feedback else None, layout=layout, chunk=0, mask=mask)
    if feedback:
        codec.unchecked(mean.device).undo_reduce(payloads, server, mask, mean, layout, 0)
    assert codec.all_finite(payload, layout)
    codec.decode(payload, x, layout=layout, mask=mask)


def step_kernels() -> None:
    """Those of fused and of local steps, by their tests."""
    tests: Any = importlib.import_module("tests.gpu.test_fused_momentum")
    tests.SIZES = [SIZES]
    for block_size, dtypes in [(1024, dtypes) for dtypes in tests.DTYPES.values()] + [(None, DTYPES), (96, DTYPES)]:
        tests.test_what_is_sent_and_kept_is_the_codecs_for_the_local_momentum(block_size, "mean", dtypes)
        tests.test_parameters_move_as_by_separate_operations(block_size, "mean", dtypes)
        tests.test_error_feedback_is_put_back_where_the_step_does_not_proceed(block_size)
    for block_size, dtypes in [(1024, dtypes) for dtypes in tests.DTYPES.values()] + [(96, DTYPES)]:
        tests.test_a_local_momentum_is_written_to_wherever_a_chunk_is(block_size, dtypes)
    tests.test_scalars_are_those_of_fp64_rounded_once(1e-3, True)
    local: Any = importlib.import_module("tests.gpu.test_local_step")
    for dtypes in local.DTYPES.values():
        local.test_a_step_is_that_of_separate_operations(dtypes)
    local.test_a_step_with_a_number_that_is_not_finite_adds_nothing(float("nan"), 0.25)
    lamb: Any = importlib.import_module("tests.gpu.test_lamb_step")
    lamb.SIZES = [*lamb.SIZES[:4], 9_000]
    for dtypes in lamb.DTYPES.values():
        lamb.test_a_step_and_the_next_factors_are_those_of_float64(dtypes)


def adam_kernels() -> None:
    """FusedAdam's, for each mix of dtypes."""
    for dtype, grad_dtype, decoupled, master in itertools.product(DTYPES, DTYPES, (True, False), (True, False)):
        params = [torch.nn.Parameter(torch.randn(n, device="cuda").to(dtype)) for n in SIZES]
        optimizer = FusedAdam(params, adam_w_mode=decoupled, weight_decay=0.1, master_weights=master)
        if hasattr(params[0], "grad_dtype"):
            for p in params:
                p.grad_dtype = grad_dtype
        elif dtype != grad_dtype:
            continue
        for p in params:
            p.grad = torch.randn(p.numel(), device="cuda").to(grad_dtype)
        optimizer.step()


def peer_kernels() -> None:
    """One rank with itself: the tools let kernels run one after the other, and two would wait for each other."""
    peers: Any = importlib.import_module("tests.gpu.test_peer_memory")
    for nbytes, skew in ((33_792, 0), (5000, 1)):
        peers.test_every_rank_gets_a_piece_of_every_rank(1, nbytes, skew, True)
    buffers: Any = importlib.import_module("tests.gpu.test_peer_buffers")
    for piece in buffers.PIECES:
        buffers.test_every_rank_gets_a_piece_of_every_rank(1, piece, True)


def main() -> None:
    """Run all and say which kernels were launched."""
    names: set[str] = set()
    function = module._function

    @functools.wraps(function)
    def noted(file: str | Path, kernel: str, device: int) -> Any:
        name = f"{Path(file).name}: {kernel}"
        if name not in names:
            print(name, flush=True)  # at once, so that a run that is cut off tells how far it came
        names.add(name)
        return function(file, kernel, device)

    module._function = noted  # type: ignore[assignment]
    for run in (codec_kernels, quantized_kernels, step_kernels, adam_kernels, peer_kernels):
        run()
        torch.cuda.synchronize()
    print(len(names), "kernels were run")


if __name__ == "__main__":
    main()
