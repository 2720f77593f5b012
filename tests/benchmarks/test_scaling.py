"""The scale model: formulas where they are known by hand, constants found again, and a page made from results."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest

from onebit.benchmarks import model_plot, record, scaling
from onebit.benchmarks.model import FRAME, Host, Wire, compressed, compressed_bytes, plain, plain_bytes, two_level
from onebit.benchmarks.model_fit import Point, fit, is_loopback, is_shaped, points

ROOT = Path(__file__).resolve().parents[2]
HOST = Host(message=2e-4, call=1e-3, byte=1e-9, element=1.2e-9, served=8e-10)
FREE = Host(message=0.0, call=0.0, byte=0.0, element=0.0, served=0.0)
WIRE = Wire(rate=1.25e8)


def measured(ranks: int, host: Host, link: str = "loopback") -> record.Document:
    """A result whose times are the model's own."""
    rows = []
    for numel in (1 << 14, 1 << 19, 1 << 24):
        for case, mode in (("all_reduce", "plain"), ("compressed", "compressed")):
            share = max(1.0, ranks / 2)
            wire = Wire(rate=1.25e8, burst=512 * 1024) if link.endswith("1gbit") else Wire()
            point = Point(
                source="x", mode=mode, ranks=ranks, numel=numel, bucket=1 << 22, share=share, wire=wire, seconds=1.0
            )
            stages = {
                "encode": share * host.element * numel / 2,
                "decode": share * host.element * numel / 2,
                "reduce_encode": share * host.served * numel / ranks,
            }
            rows.append(
                {
                    "case": case,
                    "dtype": "float32",
                    "numel": numel,
                    "stages": stages if mode == "compressed" else {},
                    "time": {"median": point.predicted(host)},
                }
            )
    run = {"ranks": ranks, "threads": 1, "bucket_mb": 16.0, "link": link}
    return {"name": f"made-{ranks}", "run": run, "machine": {"cores": 2}, "rows": rows}


def test_bytes_of_two_ranks_are_what_the_driver_counts() -> None:
    [path] = (ROOT / "benchmarks" / "results").glob("cpu-2core-net-1gbit-????-??-??.json")
    rows = {(row["case"], row["numel"]): row["wire_formula"] for row in record.load(path)["rows"]}
    for numel in (1 << 14, 1 << 19, 1 << 24):
        assert compressed_bytes(2, numel) == rows["compressed", numel]
        assert plain_bytes(2, numel) == rows["all_reduce", numel]


def test_nothing_but_a_wire_is_bytes_over_its_rate() -> None:
    assert plain(FREE, WIRE, 2, 10**6) == pytest.approx(4e6 * FRAME / 1.25e8)
    ratio = plain(FREE, WIRE, 8, 1 << 30) / compressed(FREE, WIRE, 8, 1 << 30)
    assert ratio == pytest.approx(4096 / 132)  # 31.03, whatever the number of ranks


def test_a_burst_is_free_and_no_more() -> None:
    wire = replace(WIRE, burst=1e6)
    assert wire.seconds(1e5) == 0.0
    assert WIRE.seconds(1e7) - wire.seconds(1e7) == pytest.approx(1e6 / 1.25e8)


def test_calls_made_ahead_of_a_device_count_only_where_they_are_longer() -> None:
    device = replace(HOST, ahead=True, message=0.0)
    assert compressed(device, Wire(), 2, 1024) == device.call
    free = replace(device, call=0.0)
    assert compressed(device, Wire(), 2, 1 << 24) == compressed(free, Wire(), 2, 1 << 24)
    assert compressed(replace(device, ahead=False), Wire(), 2, 1 << 24) > compressed(free, Wire(), 2, 1 << 24)


def test_a_chunk_is_one_block_at_least_so_large_groups_send_more() -> None:
    assert compressed_bytes(1 << 14, 1 << 20) == 2 * ((1 << 14) - 1) * 132
    assert compressed_bytes(1 << 14, 1 << 20) > compressed_bytes(1 << 10, 1 << 20)


def test_two_levels_need_fewer_messages_and_one_host_sends_nothing() -> None:
    many = 1 << 12
    assert two_level(HOST, Wire(), WIRE, many, 1 << 24, 8) < compressed(HOST, WIRE, many, 1 << 24)
    assert two_level(HOST, Wire(), replace(WIRE, rate=1.0), 8, 1 << 24, 8) == plain(HOST, Wire(), 8, 1 << 24)


def test_the_fit_finds_constants_again_also_where_ranks_share_processors() -> None:
    found = fit([measured(2, HOST), measured(4, HOST)])
    for name in ("message", "call", "byte", "element", "served"):
        assert getattr(found, name) == pytest.approx(getattr(HOST, name), rel=0.02), name  # the search stops near it


def test_the_model_errs_nowhere_on_shaped_links_that_follow_it() -> None:
    shaped = measured(3, HOST, link="3 namespaces, 1gbit")
    assert is_shaped(shaped)
    assert not is_loopback(shaped)
    assert [point.error(HOST) for point in points(shaped)] == pytest.approx([0.0] * 6)


def test_results_with_a_delay_or_of_other_runs_are_left_out() -> None:
    assert not is_shaped(measured(2, HOST, link="2 namespaces, 1gbit, 5ms"))
    shared = measured(4, HOST, link="2 namespaces of 2 ranks, 1gbit")
    shared["run"]["local"] = 2
    assert not is_shaped(shared)
    other = copy.deepcopy(measured(2, HOST))
    other["rows"] = [{"cache": "empty"}]
    assert not is_loopback(other)
    del other["run"]["link"]
    assert not is_loopback(other)
    assert not is_shaped(other)


def test_without_stages_the_fit_says_what_to_run() -> None:
    with pytest.raises(ValueError, match="make bench-gloo"):
        fit([])


def test_break_even_lies_where_both_take_as_long() -> None:
    slow = replace(HOST, byte=0.0)  # 2 ns of kernels per element: they take longer than a fast link does
    rate = model_plot.break_even(slow, 2, 10**9)
    assert rate is not None
    assert model_plot.gain(slow, rate, 2, 10**9) >= 1.0 > model_plot.gain(slow, 1.2 * rate, 2, 10**9)
    assert model_plot.rate_text(None) == "> 400"
    assert [model_plot.rate_text(rate) for rate in (0.0, 0.123, 4.56, 78.9)] == ["never", "0.12", "4.6", "79"]


def test_flat_averages_stop_scaling_sooner_on_faster_links() -> None:
    device = replace(FREE, message=5e-6)  # kernels that take no time leave bytes and messages
    found = [model_plot.stops_scaling(device, rate, 10**9) or math.inf for rate in (1.0, 400.0)]
    assert found[0] > found[1]


def test_the_page_is_made_from_the_results_that_stand_beside_the_code(tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    page.write_text((ROOT / "docs" / "scaling.md").read_text())
    assert scaling.main([f"--results={ROOT / 'benchmarks' / 'results'}", f"--page={page}"]) == 0
    text = page.read_text()
    assert "points; error: median" in text
    assert text.count("<!-- model:") == 4
    for name in ("scaling-break-even.png", "scaling-ranks.png"):
        assert name in text
        assert (tmp_path / name).stat().st_size > 10_000
