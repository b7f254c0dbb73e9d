"""Online calibration with numpy: what the compiled one (csrc/tree/calibration.h) is defined by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plain_tree import PlainTree

from specbranch.core.tree import Proposals, Signals

Vector = NDArray[np.float64]

# bias, logit of the agreement, entropy, margin, depth, last token accepted, tokens accepted lately, forecast
PRIOR_MEAN = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # the draft's own probability
PRIOR_SPREAD = (0.7, 0.3, 0.2, 0.1, 0.1, 0.5, 0.5, 0.1)
FORGETTING = 0.999  # the text changes its subject
COVERED = 0.75  # prior chance that the target's token is among the other candidates, given that the first is not it


class PlainCalibrator:
    """Turns the draft's signals into probabilities.

    State: weights and covariance of the logistic model, and how often the other candidates held the target's token.
    """

    def __init__(self) -> None:
        self.weights: Vector = np.array(PRIOR_MEAN)
        self.covariance: Vector = np.diag(np.square(PRIOR_SPREAD))
        self.labels = 0
        self._last = 1.0  # whether the newest judged token was accepted
        self._lately = 0.8
        self._covered, self._missed = 8 * COVERED, 8.0

    def state(self) -> dict[str, Any]:
        """What it has learned, ready for JSON; `restore` takes it."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the calibrator did that gave `state`."""
        for name, value in state.items():
            setattr(self, name, np.array(value) if isinstance(value, list) else value)

    def features(self, signals: Sequence[Signals]) -> Vector:
        """[n, features]."""
        agreement, entropy, margin, depth, forecast = np.array(signals, dtype=np.float64).T
        agreement = agreement.clip(1e-4, 1 - 1e-4)
        x = np.empty((len(signals), len(PRIOR_MEAN)))
        x[:, 0] = 1.0
        x[:, 1] = np.log(agreement / (1 - agreement))
        x[:, 2] = entropy - 1.0
        x[:, 3] = np.minimum(margin, 8.0) - 2.0
        x[:, 4] = np.log1p(depth) - 1.0
        x[:, 5] = self._last - 0.8
        x[:, 6] = self._lately - 0.8
        x[:, 7] = forecast
        return x

    def correct(self, proposals: Sequence[Proposals]) -> list[Proposals]:
        """The draft's proposals with the chance, for each candidate, that the target picks it."""
        x = self.features([each.signals for each in proposals if each.signals is not None])
        # The mean over the weights' uncertainty, by MacKay's approximation: less sure while little is known.
        spread = np.sqrt(1 + math.pi / 8 * ((x @ self.covariance) * x).sum(1))
        first = (1 / (1 + np.exp(-(x @ self.weights) / spread))).tolist()
        share = self._covered / self._missed
        corrected = []
        for chance, (tokens, confidence, signals) in zip(first, proposals, strict=True):
            others = sum(confidence) - confidence[0]
            scale = (1 - chance) * share / others if others > 0 else 0.0
            corrected.append(Proposals(tokens, (chance, *[scale * one for one in confidence[1:]]), signals))
        return corrected

    def observe(self, tree: PlainTree, path: Sequence[int], next_token: int) -> None:
        """Take a verdict's labels: at every accepted node, the root first, the token that the target went on with."""
        for node, token in zip(path, [*tree.tokens(path[1:]), next_token], strict=True):
            proposals = tree.proposals[node]
            if proposals is not None and proposals.signals is not None:
                self.learn(proposals.signals, proposals.tokens[0] == token, token in proposals.tokens)

    def learn(self, signals: Signals, accepted: bool, covered: bool) -> None:
        """One label: whether the target's token was the first candidate there, or (covered) any candidate."""
        x = self.features([signals])[0]
        p = 1 / (1 + math.exp(-float(x @ self.weights)))
        spread = self.covariance @ x
        variance = p * (1 - p)
        gain = spread / (1 + variance * float(x @ spread))
        self.weights = self.weights + gain * (accepted - p)
        self.covariance = (self.covariance - variance * np.outer(gain, spread)) / FORGETTING
        # Forgetting must not let what is never observed grow without bound.
        self.covariance *= min(1.0, float(np.square(PRIOR_SPREAD).sum() / np.trace(self.covariance)))
        self.labels += 1
        self._last = float(accepted)
        self._lately = 0.9 * self._lately + 0.1 * accepted
        if not accepted:
            self._covered = 0.99 * self._covered + covered
            self._missed = 0.99 * self._missed + 1
