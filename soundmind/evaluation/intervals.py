"""Shares with intervals, and two models on the same rows.

    interval    Wilson score interval, 95 %; over several answers a row, with the number of
                independent ones
    McNemar     exact two-sided test on the rows that only one of two models gets right
    bootstrap   rows resampled with replacement, both models on the same ones; percentile interval
    Holm        step-down correction of several p-values

    >>> wilson_interval(534, 656)          # the paper's 81.40 %
    (0.7824..., 0.8418...)

Rates are dictionaries that carry their own count, so that no number travels without its n. Pure
functions over plain values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 10_000

Metric = dict[str, Any]


# --- one proportion -------------------------------------------------------------------------------


def wilson_interval(
    correct: float, n: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Wilson score interval of `correct` out of `n`, as shares; ValueError where there is none.

    Neither has to be whole: rows with several answers are worth less than their answers and more
    than one row each, see `clustered_interval`. (scipy's takes whole counts alone.)
    """
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"no interval for {correct} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # exact at the ends, where rounding would leave 1e-17
    return (0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half)


def clustered_interval(shares: Sequence[float], answers: int) -> tuple[float, float]:
    """Interval of the mean of `shares`, each the right part of a row's `answers` answers.

    Wilson's, with as many independent answers as the spread between rows says there are: between
    one a row and all of them (Korn and Graubard 1998). For the spread one row all right and one all
    wrong are added, so that equal rows do not look certain; a bootstrap would print 0.0 to 0.0.
    """
    mean, n = float(np.mean(shares)), len(shares)
    padded = np.array([*shares, 0.0, 1.0])
    spread = float(padded.var(ddof=1))
    independent = min(n * answers, n * float(padded.mean()) * (1 - float(padded.mean())) / spread)
    independent = max(1.0, independent)
    return wilson_interval(mean * independent, independent)


def rate(flags: Iterable[bool | int]) -> Metric:
    """{"n", "correct", "value", "interval"} of yes-or-no outcomes; value None where n is 0."""
    outcomes = [bool(flag) for flag in flags]
    n, correct = len(outcomes), sum(outcomes)
    if n == 0:
        return {"n": 0, "correct": 0, "value": None, "interval": None}
    return {
        "n": n,
        "correct": correct,
        "value": correct / n,
        "interval": list(wilson_interval(correct, n)),
    }


def spread(values: Iterable[float | int | None]) -> Metric:
    """{"n", "mean", "median", "p95", "max", "sum"} of the values that are there."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if known.size == 0:
        return {"n": 0, "mean": None, "median": None, "p95": None, "max": None, "sum": 0.0}
    return {
        "n": int(known.size),
        "mean": float(known.mean()),
        "median": float(np.median(known)),
        "p95": float(np.percentile(known, 95)),
        "max": float(known.max()),
        "sum": float(known.sum()),
    }


# --- two or more models on the same rows ----------------------------------------------------------


def mcnemar_exact(won: int, lost: int) -> float:
    """Two-sided exact McNemar p-value: `won` rows turned right, `lost` rows turned wrong."""
    if won < 0 or lost < 0:
        raise ValueError(f"counts must not be negative: won {won}, lost {lost}")
    from scipy.stats import binomtest  # looks for torch, and takes half a second

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def bootstrap_means(
    values: Sequence[float] | npt.NDArray[np.float64],
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Means of `samples` resamples of `values` with replacement, shape (samples,) float64."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("nothing to resample")
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(data, return_counts=True)
    if distinct.size <= 64:  # a resample is fully described by how often each value is drawn
        draws = generator.multinomial(data.size, counts / data.size, size=samples)
        return np.asarray(draws @ distinct / data.size)
    means = np.empty(samples)
    for start in range(0, samples, 1000):  # bounds memory: 1000 x n indices at a time
        stop = min(start + 1000, samples)
        chosen = generator.integers(0, data.size, size=(stop - start, data.size))
        means[start:stop] = data[chosen].mean(axis=1)
    return means


def percentile_interval(
    means: npt.NDArray[np.float64], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The middle `confidence` of bootstrap means."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Metric:
    """Difference of means after - before on the same rows: value, interval and two-sided p.

    p is twice the share of resampled differences on the other side of zero, at least
    1 / samples: a resampling test cannot show less.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows against {len(after)}: not paired")
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    means = bootstrap_means(differences, samples, seed)
    beyond = min(np.mean(means <= 0), np.mean(means >= 0))
    return {
        "n": len(before),
        "value": float(differences.mean()),
        "interval": list(percentile_interval(means)),
        "p": float(min(1.0, max(2 * beyond, 1 / samples))),
        "samples": samples,
        "seed": seed,
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted
