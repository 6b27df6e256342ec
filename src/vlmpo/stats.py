"""Confidence intervals, in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(successes: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): holds its level also near 0 and 1. (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], z: float = Z_95) -> tuple[float, float, float]:
    """Mean and its normal interval, ``mean -+ z s / sqrt(n)``, s the sample's standard deviation; n of at least 1."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, -math.inf, math.inf
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    half = z * spread / math.sqrt(count)
    return mean, mean - half, mean + half


def paired_bootstrap(
    mine: Sequence[float], other: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``mine - other``, item by item, and its 95 % percentile bootstrap interval (Efron 1979).

    Args:
        mine, other: a score an item, of the same items in the same order; at least one.
        resamples: draws of all items with replacement.
        seed: of the draws.
    """
    differences = [a - b for a, b in zip(mine, other, strict=True)]
    count = len(differences)
    draw = random.Random(seed)
    means = sorted(math.fsum(draw.choices(differences, k=count)) / count for _ in range(resamples))
    return math.fsum(differences) / count, means[int(0.025 * resamples)], means[math.ceil(0.975 * resamples) - 1]
