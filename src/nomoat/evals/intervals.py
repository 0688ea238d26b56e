"""95 % intervals and p-values for scores of a few hundred rows. NumPy and exact integers, no SciPy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution
RESAMPLES = 2000
_SEED = 20240229
_CHUNK = 1 << 21  # random numbers held at once

Floats = npt.NDArray[np.float64]


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927): honest for small n and near 0 and 1. Unknown (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At p = 0 and p = 1 the limit is exact; rounding must not push the score out of its own interval.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def bootstrap(values: Sequence[float] | Floats, weights: Sequence[float] | Floats | None = None) -> tuple[float, float]:
    """Percentile bootstrap interval of the weighted mean sum(w v) / sum(w), rows resampled whole. Seeded: it is reproducible."""
    v = np.asarray(values, np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, np.float64)
    if len(v) == 0:
        return math.nan, math.nan
    rng = np.random.default_rng(_SEED)
    means = np.concatenate([(v * w)[pick].sum(1) / w[pick].sum(1) for pick in _draws(rng, len(v))])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value: if nothing changed in truth, a fair coin decides which way each changed row went."""
    changed, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << changed))


def newcombe_paired(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """Interval of the difference of two proportions on the same rows (Newcombe 1998, method 10), after minus before.

    Joins the Wilson intervals of the two proportions and takes their correlation into account.
    """
    n = both + gained + lost + neither
    after, before = (both + gained) / n, (both + lost) / n
    low_a, high_a = wilson(both + gained, n)
    low_b, high_b = wilson(both + lost, n)
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    phi = 0.0
    if product:
        excess = both * neither - gained * lost
        phi = (max(excess - n / 2, 0.0) if excess > 0 else float(excess)) / math.sqrt(product)
    difference = after - before

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    down = reach(after - low_a, high_b - before)
    up = reach(high_a - after, before - low_b)
    return max(-1.0, difference - down), min(1.0, difference + up)


def sign_flip(differences: Sequence[float] | Floats, flips: int = 10_000) -> float:
    """Two-sided p-value of a paired difference of means: how often random signs give one as large. Seeded."""
    d = np.asarray(differences, np.float64)
    if len(d) == 0 or not d.any():
        return 1.0
    rng = np.random.default_rng(_SEED)
    # Equal up to rounding counts as "as large": the observed signs are one of the possible draws.
    bar = abs(d.sum()) * (1 - 1e-12)
    hits = 0
    for count in _chunks(flips, len(d)):
        signs = rng.integers(0, 2, (count, len(d)), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ d) >= bar).sum())
    return (hits + 1) / (flips + 1)


def _draws(rng: np.random.Generator, n: int) -> Iterator[npt.NDArray[np.int64]]:
    for count in _chunks(RESAMPLES, n):
        yield rng.integers(0, n, (count, n))


def _chunks(total: int, width: int) -> Iterator[int]:
    step = max(1, _CHUNK // width)
    for begin in range(0, total, step):
        yield min(step, total - begin)
