"""Intervals against published or hand-worked numbers."""

from __future__ import annotations

import math
import random

import pytest

from vlmpo.stats import mean_interval, paired_bootstrap, wilson


def test_wilson_by_hand() -> None:
    # 8 of 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.71674
    # half 1.96 sqrt(0.016 + 0.009604) / 1.38416 = 0.22658
    low, high = wilson(8, 10, z=1.96)
    assert low == pytest.approx(0.49016, abs=1e-4)
    assert high == pytest.approx(0.94332, abs=1e-4)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    assert wilson(0, 10)[1] == pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6)


def test_mean_interval_by_hand() -> None:
    # mean 2, s = 1, s / sqrt(3) = 0.57735
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - 2.0 == pytest.approx(1.959964 / math.sqrt(3), abs=1e-6)
    assert 2.0 - low == pytest.approx(high - 2.0)
    assert mean_interval([4.0]) == (4.0, -math.inf, math.inf)


def test_paired_bootstrap() -> None:
    assert paired_bootstrap([1.0, 1.0], [0.0, 0.0]) == (1.0, 1.0, 1.0)
    draw = random.Random(3)
    other = [float(draw.random() < 0.5) for _ in range(400)]
    better = [value if draw.random() < 0.8 else 1.0 for value in other]
    mean, low, high = paired_bootstrap(better, other)
    exact, expected_low, expected_high = mean_interval([a - b for a, b in zip(better, other, strict=True)])
    assert mean == exact
    assert low == pytest.approx(expected_low, abs=0.01)  # with 400 items the normal interval is near
    assert high == pytest.approx(expected_high, abs=0.01)
    assert paired_bootstrap(better, other, seed=1) == paired_bootstrap(better, other, seed=1)
