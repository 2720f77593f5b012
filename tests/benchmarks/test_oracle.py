"""The oracle itself: it accepts what an encoding by hand gives, and counts exactly what is spoilt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onebit.benchmarks.oracle import Payload, block_means, spans, wrong_average, wrong_encoding

BLOCK = 64
NUMEL = 200  # three blocks and a rest of 8


@pytest.fixture
def exact() -> np.ndarray:
    return np.random.default_rng(5).standard_normal(NUMEL).astype(np.float32).astype(np.float64)


def encode(exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Payload bytes and residual, one block at a time."""
    bits, scales, residual = [], [], []
    for start in range(0, NUMEL, BLOCK):
        c = exact[start : start + BLOCK]
        scale = np.float32(np.abs(c).mean())
        bits.append(np.packbits(np.pad(c >= 0, (0, BLOCK - len(c))), bitorder="little"))
        scales.append(scale)
        residual.append(c - np.where(c >= 0, scale, -scale))
    payload = np.concatenate([*bits, np.array(scales, np.float32).view(np.uint8)])
    return payload, np.concatenate(residual).astype(np.float32)


def count(exact: np.ndarray, payload: np.ndarray, residual: np.ndarray) -> int:
    whole = slice(0, NUMEL)
    return wrong_encoding(exact, np.zeros(NUMEL), Payload(payload, NUMEL, BLOCK), residual, whole)


def test_an_encoding_by_hand_has_no_wrong_element(exact: np.ndarray) -> None:
    assert count(exact, *encode(exact)) == 0


def test_a_flipped_sign_is_one_wrong_element(exact: np.ndarray) -> None:
    payload, residual = encode(exact)
    payload[4] ^= 4
    assert count(exact, payload, residual) == 1


def test_a_wrong_residual_is_one_wrong_element(exact: np.ndarray) -> None:
    payload, residual = encode(exact)
    residual[199] += 0.001
    assert count(exact, payload, residual) == 1


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_wrong_scale_spoils_its_whole_block(exact: np.ndarray, value: float) -> None:
    payload, residual = encode(exact)
    payload[-4:] = np.array([value], np.float32).view(np.uint8)
    assert count(exact, payload, residual) == NUMEL % BLOCK


def test_a_not_finite_residual_is_wrong(exact: np.ndarray) -> None:
    payload, residual = encode(exact)
    residual[3] = np.nan
    assert count(exact, payload, residual) == 1


def test_a_sign_within_rounding_of_zero_may_be_either(exact: np.ndarray) -> None:
    exact[10] = 1e-9
    payload, residual = encode(exact)
    payload[1] ^= 4
    residual[10] = exact[10] + payload[-16:-12].view(np.float32)[0]
    slack = np.full(NUMEL, 1e-8)
    assert wrong_encoding(exact, slack, Payload(payload, NUMEL, BLOCK), residual, slice(0, NUMEL)) == 0
    assert count(exact, payload, residual) == 1


def test_the_mean_of_a_rest_counts_its_real_elements_only() -> None:
    assert block_means(np.array([1.0, -3.0, 5.0]), 2).tolist() == [2.0, 5.0]


def test_slices_cover_everything_once_and_start_on_blocks() -> None:
    found = list(spans(10_000_000, 1024))
    assert [found[0].start, found[-1].stop] == [0, 10_000_000]
    assert all(left.stop == right.start for left, right in itertools.pairwise(found))
    assert all(span.start % 1024 == 0 for span in found)


def test_an_average_of_two_ranks_by_hand() -> None:
    first, second = np.full(BLOCK, 3.0, np.float32), np.full(BLOCK, -1.0, np.float32)
    assert wrong_average([first, second], np.ones(BLOCK, np.float32), BLOCK) == 0
    outcome = np.ones(BLOCK, np.float32)
    outcome[[0, 5]] = [-1.0, 1.1]
    assert wrong_average([first, second], outcome, BLOCK) == 2
