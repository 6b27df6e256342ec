"""Compute confidence intervals in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(successes: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927), accurate near 0 and 1 too; no trials: (0, 1)."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of n >= 1 values and its 95 % interval, ``mean -+ 1.96 s / sqrt(n)``; s: the sample deviation."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, -math.inf, math.inf
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    half = Z_95 * spread / math.sqrt(count)
    return mean, mean - half, mean + half


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of ``first - second`` and its 95 % percentile bootstrap interval (Efron 1979).

    Args:
        first, second: one score an item, for the same items in the same order; at least one item.
        resamples: how often all items are drawn with replacement.
        seed: seed of the draws.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    count = len(differences)
    draw = random.Random(seed)
    means = sorted(math.fsum(draw.choices(differences, k=count)) / count for _ in range(resamples))
    return math.fsum(differences) / count, means[int(0.025 * resamples)], means[math.ceil(0.975 * resamples) - 1]
