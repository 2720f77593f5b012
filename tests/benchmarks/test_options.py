"""Flags: sizes as one types them, sweeps, and one clear message for a bad one."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from onebit.benchmarks.options import parse
from onebit.benchmarks.sizes import format_size, parse_size, sweep_sizes
from onebit.compress import Codec, Fp8Codec, Int4Codec, Int8Codec, SignCodec


@pytest.mark.parametrize(
    ("text", "nbytes"), [("0", 0), ("4096", 4096), ("64K", 65536), ("256m", 2**28), ("1GiB", 2**30), ("2MB", 2**21)]
)
def test_sizes_are_read_in_powers_of_1024(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5M", "12T", "1 0", "1KM"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize("nbytes", [0, 1, 1023, 1024, 3 * 2**20, 2**33, 2**20 + 1])
def test_a_printed_size_reads_back(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == nbytes


def test_a_sweep_multiplies_up_to_its_end() -> None:
    assert sweep_sizes(1, 9, 2) == [1, 2, 4, 8]
    assert parse(["-b1K", "-e64K", "-f4"]).sizes == (2**10, 2**12, 2**14, 2**16)


def test_without_an_end_there_is_one_size() -> None:
    assert parse(["-b8M"]).sizes == (2**23,)


def test_flags_arrive() -> None:
    options = parse(["-n7", "-w0", "-c0", "-dbf16", "--case=encode,decode", "--backend=mpi", "--output=x"])
    assert (options.sweep.iterations, options.sweep.warmup, options.sweep.check) == (7, 0, False)
    assert options.dtype == torch.bfloat16
    assert (options.cases, options.backend, options.output) == (("encode", "decode"), "mpi", Path("x"))


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("", SignCodec()),
        ("block_size=64,scale=rms", SignCodec(block_size=64, scale="rms")),
        ("block_size=none,kernels=reference", SignCodec(block_size=None, kernels="reference")),
        ("sign:scale=rms", SignCodec(scale="rms")),
        ("int8", Int8Codec()),
        ("int8:error_feedback=false,block_size=256", Int8Codec(error_feedback=False, block_size=256)),
        ("int4:rounding=stochastic,rotate=true,seed=3", Int4Codec(rounding="stochastic", rotate=True, seed=3)),
        ("fp8", Fp8Codec()),
    ],
)
def test_a_codec_is_read_from_its_options(text: str, codec: Codec) -> None:
    assert parse([f"--codec={text}"]).codec == codec


def test_buckets_have_the_size_that_suits_the_device() -> None:
    sizes = [parse(flags).bucket_mb for flags in ([], ["--device=cuda"], ["--device=cuda", "--bucket_mb=4"])]
    assert sizes == [16.0, 512.0, 4.0]


def test_tensors_are_where_the_backend_carries_them() -> None:
    assert [parse(flags).device for flags in ([], ["--backend=nccl"], ["--backend=mpi", "--device=cuda"])] == [
        "cpu",
        "cuda",
        "cuda",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-b2K", "-e1K"], "-b 2048 -e 1024"),
        (["-b0"], "1 <= -b"),
        (["-f1"], "-f >= 2"),
        (["-n0"], "iterations >= 1"),
        (["-bmuch"], "'much' is no size"),
        (["--case=sort"], "no case sort; there are"),
        (["-G1"], "--graph 1 needs --device cuda"),
        (["-m0"], "at least 1 run together"),
        (["--plot"], "name its folder with --output"),
        (["--backend=gloo", "--device=cuda"], "gloo does not carry tensors on cuda"),
        (["--codec=bits=2"], "--codec sign knows block_size, kernels, scale; got bits"),
        (["--codec=block_size=7"], "--codec block_size=7: "),
        (["--codec=int16"], "--codec knows sign, int8, int4, fp8; got int16"),
        (["--codec=int16:seed=1"], "--codec knows sign, int8, int4, fp8; got int16"),
        (["--codec=fp8:seed=1"], "--codec fp8 knows block_size, kernels, error_feedback; got seed"),
        (["--codec=int8:rotate=yes"], "expected true or false, got 'yes'"),
        (["--codec=block_size=much"], "invalid literal"),
        (["--cases=peers"], "the peers asked for do not run on cpu; add --device cuda"),
        (["--backend=tcp"], "invalid choice: 'tcp'"),
    ],
)
def test_a_bad_flag_is_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(flags)
    assert message in capsys.readouterr().err
