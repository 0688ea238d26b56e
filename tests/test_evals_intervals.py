"""Intervals and p-values: published figures, exact counting, and coverage on simulated data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nomoat.evals.intervals import bootstrap, mcnemar, newcombe_paired, sign_flip, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_on_the_examples_of_newcombe_1998(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 7, 200])
def test_wilson_holds_its_own_estimate(n: int) -> None:
    for hits in range(n + 1):
        low, high = wilson(hits, n)
        assert 0.0 <= low <= hits / n <= high <= 1.0
        assert (low, high) == pytest.approx((1 - wilson(n - hits, n)[1], 1 - wilson(n - hits, n)[0]))


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_bootstrap_agrees_with_the_normal_interval_of_a_mean(seed: int) -> None:
    values = np.random.default_rng(seed).normal(3.0, 2.0, 400)
    low, high = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert bootstrap(values) == (low, high)


def test_bootstrap_weighs_rows() -> None:
    values, weights = np.array([1.0, 5.0] * 50), np.array([99.0, 1.0] * 50)
    low, high = bootstrap(values, weights)
    assert low <= 1.04 <= high < 1.1


def test_mcnemar_by_counting_every_outcome() -> None:
    for gained, lost in ((0, 0), (1, 0), (5, 1), (6, 2), (4, 4)):
        flips = list(itertools.product((0, 1), repeat=gained + lost))
        far = sum(abs(2 * sum(f) - len(f)) >= abs(gained - lost) for f in flips)
        assert mcnemar(gained, lost) == pytest.approx(far / len(flips))
    assert mcnemar(5000, 10) < 1e-300


def test_newcombe_paired_on_the_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, table II: a, b, c, d = 36, 12, 2, 0, method 10.
    assert newcombe_paired(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    low, high = newcombe_paired(36, 2, 12, 0)
    assert (-high, -low) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_newcombe_paired_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    chances = np.array([0.15, 0.30, 0.05, 0.50])  # both, gained, lost, neither: a true difference of 0.25
    tables = rng.multinomial(100, chances, 600)
    covered = sum(low <= 0.25 <= high for low, high in (newcombe_paired(*map(int, t)) for t in tables))
    assert 0.92 <= covered / len(tables) <= 0.985


@pytest.mark.parametrize("table", [(0, 0, 0, 9), (9, 0, 0, 0), (0, 9, 0, 0), (0, 0, 9, 0), (1, 0, 0, 0)])
def test_newcombe_paired_at_the_corners(table: tuple[int, int, int, int]) -> None:
    low, high = newcombe_paired(*table)
    assert -1.0 <= low <= (table[1] - table[2]) / sum(table) <= high <= 1.0


def test_sign_flip_agrees_with_all_sign_patterns() -> None:
    differences = np.array([0.3, 0.1, -0.05, 0.2, 0.15, 0.02, 0.11])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    wanted = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    assert sign_flip(differences) == pytest.approx(wanted, abs=0.01)
    assert sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([1.0] * 40) < 0.001
