"""Online calibration: the draft's confidence at first, the labels' after a while, and never anything but
probabilities."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbranch.core.tree import Proposals, Signals
from specbranch.policies.calibration import Calibrator


def signals(agreement: float, depth: int = 1, forecast: float = 0.0) -> Signals:
    return Signals(agreement, entropy=1.0, margin=2.0, depth=depth, forecast=forecast)


def chances(calibrator: Calibrator, signals: Signals, confidence: tuple[float, ...]) -> tuple[float, ...]:
    tokens = tuple(range(len(confidence)))
    return calibrator.correct([Proposals(tokens, confidence, signals)])[0].confidence


@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.9])
def test_before_any_label_it_takes_about_the_drafts_confidence(confidence: float) -> None:
    chance = chances(Calibrator(), signals(confidence), (confidence, 1 - confidence))[0]
    assert abs(chance - confidence) < 0.1
    assert abs(chance - 0.5) <= abs(confidence - 0.5)  # and is a little less sure


@pytest.mark.parametrize("truth", [0.2, 0.6, 0.95])
def test_it_learns_how_often_the_draft_is_right(truth: float) -> None:
    calibrator, draw = Calibrator(), random.Random(1)
    for _ in range(400):
        calibrator.learn(signals(0.8), accepted=draw.random() < truth, covered=True)
    assert chances(calibrator, signals(0.8), (0.8, 0.2))[0] == pytest.approx(truth, abs=0.12)


def test_it_learns_to_tell_sure_from_unsure() -> None:
    """A draft that overstates: 0.9 means 0.7 and 0.5 means 0.1."""
    calibrator, draw = Calibrator(), random.Random(2)
    for _ in range(600):
        confidence, truth = draw.choice([(0.9, 0.7), (0.5, 0.1)])
        calibrator.learn(signals(confidence), accepted=draw.random() < truth, covered=False)
    sure, unsure = (chances(calibrator, signals(confidence), (confidence,))[0] for confidence in (0.9, 0.5))
    assert sure == pytest.approx(0.7, abs=0.12)
    assert unsure == pytest.approx(0.1, abs=0.12)


def test_a_forecast_counts_as_far_as_it_is_right() -> None:
    weights = []
    for informed in (False, True):
        calibrator, draw = Calibrator(), random.Random(3)
        for _ in range(800):
            accepted = draw.random() < 0.5
            predicted = accepted if informed else draw.random() < 0.5
            calibrator.learn(signals(0.5, forecast=1.5 if predicted else -1.5), accepted, covered=True)
        likely, unlikely = (chances(calibrator, signals(0.5, forecast=sign), (0.5,))[0] for sign in (1.5, -1.5))
        weights.append(likely - unlikely)
    assert abs(weights[0]) < 0.1
    assert weights[1] > 0.5


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans(), st.integers(0, 40)), max_size=60),
    st.lists(st.floats(0.001, 1), min_size=1, max_size=6),
)
def test_chances_are_probabilities_in_the_drafts_order_whatever_the_labels(
    labels: list[tuple[float, bool, bool, int]], weights: list[float]
) -> None:
    calibrators = Calibrator(), Calibrator()
    for calibrator in calibrators:
        for agreement, accepted, covered, depth in labels:
            calibrator.learn(signals(agreement, depth), accepted, covered or accepted)
    confidence = tuple(sorted((weight / sum(weights) for weight in weights), reverse=True))
    first, second = (chances(calibrator, signals(confidence[0]), confidence) for calibrator in calibrators)
    assert all(0 <= chance <= 1 for chance in first)
    assert sum(first) <= 1 + 1e-9
    assert list(first[1:]) == sorted(first[1:], reverse=True)
    assert first == second  # the same labels, the same chances
