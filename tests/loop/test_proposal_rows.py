"""A draft's run, whose rows are kept together, against its rows one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_calibration import PlainCalibrator
from plain_tree import PlainTree
from trees import STEP, run_of_one_row

from specbranch.core.tree import ProposalRows, Proposals, Signals, Tree
from specbranch.policies.calibration import Calibrator


def plain_row(row: list[tuple[int, float, float]], entropy: float, depth: int, odds: float, greedy: bool) -> Proposals:
    """One node's candidates, with the draft's own confidence in each."""
    tokens = tuple(token for token, _, _ in row if token >= 0)
    scores = [score for _, score, _ in row][: len(tokens)]
    weights = [math.exp(score - scores[0]) for score in scores]
    confidence = [chance for _, _, chance in row] if greedy else [weight / math.fsum(weights) for weight in weights]
    margin = scores[0] - scores[1] if len(tokens) > 1 else math.inf
    return Proposals(tokens, tuple(confidence[: len(tokens)]), Signals(confidence[0], entropy, margin, depth, odds))


def close(found: Proposals, expected: Proposals, rel: float = 1e-14) -> bool:
    assert found.tokens == expected.tokens
    assert found.confidence == pytest.approx(expected.confidence, rel=rel, abs=1e-300)
    assert found.signals == pytest.approx(expected.signals, rel=rel, abs=1e-300)
    return True


@st.composite
def rows(draw: st.DrawFn, k: int) -> list[tuple[int, float, float]]:
    """(token, score, probability) of k candidates, some of which may be none."""
    count = draw(st.integers(1, k))
    scores = sorted((draw(st.floats(-30, 30)) for _ in range(k)), reverse=True)
    return [(i if i < count else -1, scores[i], draw(st.floats(0, 1, allow_subnormal=False))) for i in range(k)]


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_a_run_is_its_rows_one_by_one(data: st.DataObject, steps: int, nodes: int, k: int, greedy: bool) -> None:
    found, expected = ProposalRows(), []
    odds = (0.5, -0.25)
    depths = data.draw(st.lists(st.integers(0, 3), min_size=nodes, max_size=nodes))
    for step in range(steps):
        each = [data.draw(rows(k)) for _ in range(nodes)]
        entropy = [data.draw(st.floats(0, 9)) for _ in range(nodes)]
        tokens, scores, chances = ([[item[i] for item in row] for row in each] for i in range(3))
        below = [depth + step for depth in depths]
        found.add(tokens, scores, chances if greedy else None, entropy, below, odds)  # type: ignore[arg-type]
        numbers = zip(each, entropy, below, strict=True)
        expected.append([plain_row(row, nats, depth, odds[depth > 0], greedy) for row, nats, depth in numbers])
    assert len(found) == steps
    assert all(
        close(a, b) for here, there in zip(found, expected, strict=True) for a, b in zip(here, there, strict=True)
    )
    tree, plain = Tree(1, 0), PlainTree(1, 0)
    for both in (tree, plain):
        for _ in range(nodes):
            both.add(0, 1, 0.5)
    where = list(range(1, nodes + 1))
    assert tree.descend(where, found) == plain.descend(where, found)
    assert tree.reach == plain.reach
    assert list(tree.proposals) == plain.proposals
    corrected, calibrator = Calibrator().correct(found), PlainCalibrator()
    for here, there in zip(corrected, found, strict=True):
        assert all(close(a, b, 1e-12) for a, b in zip(here, calibrator.correct(there), strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens": []}, "tokens: expected one for each of 1 depths, got 0"),
        ({"scores": [[1.0], [1.0]]}, "scores: expected one for each of 1 depths, got 2"),
        ({"entropy": []}, "entropy: expected one for each"),
        ({"confidence": []}, "confidence: expected one for each"),
        ({"confidence": [[0.5]]}, "as many as tokens in each row"),
        ({"scores": [[1.0, 0.5, 0.2]]}, "as many as tokens in each row"),
        ({"tokens": [[-1, -1]]}, "draft_logits: a row has NaN or \\+inf, or masks every token"),
        ({name: value * 2 for name, value in STEP.items() if name != "forecast"}, "depths: expected 1"),
    ],
)
def test_a_step_that_is_none_is_refused(changed: dict[str, Any], said: str) -> None:
    rows = run_of_one_row()
    with pytest.raises(ValueError, match=said):
        rows.add(**{**STEP, **changed})
    assert len(rows) == 1
    with pytest.raises(IndexError):
        rows[1]
