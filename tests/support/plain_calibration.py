"""Online calibration with numpy: what the compiled one (csrc/tree/calibration.h) is defined by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plain_tree import Found, PlainTree, found_at

from specbranch.core.suffix_index import Continuations
from specbranch.core.tree import Proposals, Signals

Vector = NDArray[np.float64]

# bias, logit of the agreement, entropy, margin, depth, last token accepted, tokens accepted lately, forecast, what was
# retrieved
PRIOR_MEAN = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1)  # the draft's own probability
PRIOR_SPREAD = (0.7, 0.3, 0.2, 0.1, 0.1, 0.5, 0.5, 0.1, 0.1)
# bias, length of the match, log-odds of the share, occurrences, another ranks higher, last one accepted, accepted
# lately, a corpus, found where it was expected
RETRIEVED_MEAN = (-0.1, 1.2, 0.5, 0.4, -1.9, -0.3, 0.0, 0.0, 0.8)
RETRIEVED_SPREAD = (0.5, 0.3, 0.2, 0.3, 0.5, 0.3, 0.5, 0.5, 0.5)
FORGETTING, RETRIEVED_FORGETTING = 0.999, 0.995  # the text changes its subject
COVERED = 0.75  # prior chance that the target's token is among the other candidates, given that the first is not it


def chance(x: Vector, weights: Vector, covariance: Vector) -> Vector:
    """[n], for features [n, k]. The mean over the weights' uncertainty, by MacKay's approximation: less sure while
    little is known."""
    spread = np.sqrt(1 + math.pi / 8 * ((x @ covariance) * x).sum(1))
    found: Vector = 1 / (1 + np.exp(-(x @ weights) / spread))
    return found


def learned(
    x: Vector, label: bool, weights: Vector, covariance: Vector, prior_spread: Sequence[float], forgetting: float
) -> tuple[Vector, Vector]:
    """Weights and covariance after one more label."""
    p = 1 / (1 + math.exp(-float(x @ weights)))
    spread = covariance @ x
    variance = p * (1 - p)
    gain = spread / (1 + variance * float(x @ spread))
    weights = weights + gain * (label - p)
    covariance = (covariance - variance * np.outer(gain, spread)) / forgetting
    # Forgetting must not let what is never observed grow without bound.
    return weights, covariance * min(1.0, float(np.square(prior_spread).sum() / np.trace(covariance)))


class PlainCalibrator:
    """Turns the draft's signals, and what speaks for retrieved tokens, into probabilities.

    State: weights and covariance of both logistic models, and how often the draft's other candidates held the target's
    token.
    """

    def __init__(self) -> None:
        self.weights: Vector = np.array(PRIOR_MEAN)
        self.covariance: Vector = np.diag(np.square(PRIOR_SPREAD))
        self.labels = 0
        self._last = 1.0  # whether the newest judged token was accepted
        self._lately = 0.8
        self._covered, self._missed = 8 * COVERED, 8.0
        self.retrieved_weights: Vector = np.array(RETRIEVED_MEAN)
        self.retrieved_covariance: Vector = np.diag(np.square(RETRIEVED_SPREAD))
        self.retrieved_labels = 0
        self._retrieved_last, self._retrieved_lately = 1.0, 0.6

    def state(self) -> dict[str, Any]:
        """What it has learned, ready for JSON; `restore` takes it."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the calibrator did that gave `state`."""
        for name, value in state.items():
            setattr(self, name, np.array(value) if isinstance(value, list) else value)

    def features(self, signals: Sequence[Signals]) -> Vector:
        """[n, features]."""
        agreement, entropy, margin, depth, forecast, retrieved = np.array(signals, dtype=np.float64).T
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
        x[:, 8] = retrieved
        return x

    def correct(self, proposals: Sequence[Proposals]) -> list[Proposals]:
        """The draft's proposals with the chance, for each candidate, that the target picks it."""
        x = self.features([each.signals for each in proposals if each.signals is not None])
        first = chance(x, self.weights, self.covariance).tolist()
        share = self._covered / self._missed
        corrected = []
        for best, (tokens, confidence, signals) in zip(first, proposals, strict=True):
            others = sum(confidence) - confidence[0]
            scale = (1 - best) * share / others if others > 0 else 0.0
            corrected.append(Proposals(tokens, (best, *[scale * one for one in confidence[1:]]), signals))
        return corrected

    def observe(self, tree: PlainTree, path: Sequence[int], next_token: int) -> None:
        """Take a verdict's labels: at every accepted node, the root first, the token that the target went on with."""
        for node, token in zip(path, [*tree.tokens(path[1:]), next_token], strict=True):
            proposals = tree.proposals[node]
            if proposals is not None and proposals.signals is not None and not tree.is_bound(node):
                self.learn(proposals.signals, proposals.tokens[0] == token, token in proposals.tokens)

    def learn(self, signals: Signals, accepted: bool, covered: bool) -> None:
        """One label: whether the target's token was the first candidate there, or (covered) any candidate."""
        x = self.features([signals])[0]
        self.weights, self.covariance = learned(x, accepted, self.weights, self.covariance, PRIOR_SPREAD, FORGETTING)
        self.labels += 1
        self._last = float(accepted)
        self._lately = 0.9 * self._lately + 0.1 * accepted
        if not accepted:
            self._covered = 0.99 * self._covered + covered
            self._missed = 0.99 * self._missed + 1

    # ---- Retrieved tokens

    def retrieved_features(self, found: Sequence[Found]) -> Vector:
        """[n, features]."""
        match, count, total, source, near, first = np.array(found, dtype=np.float64).reshape(-1, 6).T
        x = np.empty((len(found), len(RETRIEVED_MEAN)))
        x[:, 0] = 1.0
        x[:, 1] = np.log(match) - 1.0
        x[:, 2] = np.log((count + 0.5) / (total - count + 0.5))
        x[:, 3] = np.log(count)
        x[:, 4] = 1.0 - first
        x[:, 5] = self._retrieved_last - 0.6
        x[:, 6] = self._retrieved_lately - 0.6
        x[:, 7] = source > 0
        x[:, 8] = near
        return x

    def chances(self, found: Continuations) -> list[float]:
        """The chance that the target picks each, if it picks those before it; of siblings together at most 1."""
        x = self.retrieved_features([found_at(found, i) for i in range(len(found))])
        each = chance(x, self.retrieved_weights, self.retrieved_covariance)
        sums = [sum(each[j] for j, other in enumerate(found.parent) if other == parent) for parent in found.parent]
        return [float(one / max(1.0, total)) for one, total in zip(each, sums, strict=True)]

    def observe_retrieved(self, tree: PlainTree, path: Sequence[int], next_token: int) -> None:
        """A verdict's labels for what was retrieved below the accepted nodes."""
        for node, token in zip(path, [*tree.tokens(path[1:]), next_token], strict=True):
            for child in tree.children[node]:
                if child in tree.found and not tree.is_bound(node):
                    self.learn_retrieved(tree.found[child][0], tree.token[child] == token)

    def learn_retrieved(self, found: Found, accepted: bool) -> None:
        """One label: whether the target's token was this one."""
        x = self.retrieved_features([found])[0]
        self.retrieved_weights, self.retrieved_covariance = learned(
            x, accepted, self.retrieved_weights, self.retrieved_covariance, RETRIEVED_SPREAD, RETRIEVED_FORGETTING
        )
        if found.first:
            self.retrieved_labels += 1
            self._retrieved_last = float(accepted)
            self._retrieved_lately = 0.9 * self._retrieved_lately + 0.1 * accepted
