"""How sure a speed-up is: the bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Sequence

RESAMPLES, SEED = 2000, 0
COVERAGE = 0.95


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """The interval of median(a) / median(b) over pairs (a, b), one pair a prompt; None for fewer than two.

    Percentile bootstrap (Efron 1979): prompts are drawn with replacement, both figures of a prompt together, always
    with the same seed.
    """
    import numpy as np

    if len(pairs) < 2:
        return None
    values = np.asarray(pairs, dtype=np.float64)  # [n, 2]
    drawn = np.random.default_rng(SEED).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    medians = np.median(values[drawn], axis=1)  # [RESAMPLES, 2]
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(medians[:, 0] / medians[:, 1], (tail, 1 - tail))
    return float(low), float(high)
