"""Online calibration: how likely the target agrees with a drafted token, learned from the verdicts while decoding.

Every verdict labels every drafted token that it judged: the accepted ones were right, the first rejected one was
wrong. A logistic model on what the draft said there is updated label by label (the extended Kalman filter of logistic
regression), so that it needs no training run. Its prior is the draft's own word; a learned predictor's (H-RAD) is one
more feature, which counts as far as the labels say that it is right. It steers how far to draft and where to branch;
it never changes the text.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from specbranch.tree import Signals

Vector = NDArray[np.float64]

# bias, logit of the agreement, entropy, margin, depth, last token stood, tokens stood lately, outlook
PRIOR_MEAN = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # the draft's own word
PRIOR_SPREAD = (0.7, 0.3, 0.2, 0.1, 0.1, 0.5, 0.5, 0.1)
FORGETTING = 0.999  # the text changes its subject
COVERED = 0.75  # prior chance that the target's token is among the other candidates, given that the first is not it


def logit(p: float) -> float:
    p = min(max(p, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p))


class Calibrator:
    """Turns the draft's signals into probabilities.

    State: weights and covariance of the logistic model, and how often the other candidates held the target's token.
    """

    def __init__(self) -> None:
        self.weights: Vector = np.array(PRIOR_MEAN)
        self.covariance: Vector = np.diag(np.square(PRIOR_SPREAD))
        self.labels = 0
        self._last = 1.0  # whether the newest judged token stood
        self._lately = 0.8
        self._covered, self._missed = 8 * COVERED, 8.0

    def features(self, signals: Signals) -> Vector:
        return np.array(
            [
                1.0,
                logit(signals.agreement),
                signals.entropy - 1.0,
                min(signals.margin, 8.0) - 2.0,
                math.log1p(signals.depth) - 1.0,
                self._last - 0.8,
                self._lately - 0.8,
                signals.outlook,
            ]
        )

    def chances(self, signals: Signals, agreement: tuple[float, ...]) -> tuple[float, ...]:
        """The chance that the target picks each candidate; agreement: the draft's own word on each, best first."""
        x = self.features(signals)
        # The mean over the weights' uncertainty, by MacKay's approximation: less sure while little is known.
        spread = math.sqrt(1 + math.pi / 8 * float(x @ self.covariance @ x))
        first = 1 / (1 + math.exp(-float(x @ self.weights) / spread))
        others = sum(agreement[1:])
        rest = (1 - first) * self._covered / self._missed
        return (first, *(rest * chance / others if others > 0 else 0.0 for chance in agreement[1:]))

    def learn(self, signals: Signals, stood: bool, covered: bool) -> None:
        """One label: whether the target's token was the first candidate there, or (covered) any candidate."""
        x = self.features(signals)
        p = 1 / (1 + math.exp(-float(x @ self.weights)))
        spread = self.covariance @ x
        variance = p * (1 - p)
        gain = spread / (1 + variance * float(x @ spread))
        self.weights = self.weights + gain * (stood - p)
        self.covariance = (self.covariance - variance * np.outer(gain, spread)) / FORGETTING
        # Forgetting must not let what is never observed grow without bound.
        self.covariance *= min(1.0, float(np.square(PRIOR_SPREAD).sum() / np.trace(self.covariance)))
        self.labels += 1
        self._last = float(stood)
        self._lately = 0.9 * self._lately + 0.1 * stood
        if not stood:
            self._covered = 0.99 * self._covered + covered
            self._missed = 0.99 * self._missed + 1
