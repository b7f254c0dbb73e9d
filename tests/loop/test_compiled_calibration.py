"""The compiled calibration against its definition in Python, as far as sums in another order allow."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from drawn_trees import SIGNALS, found_tokens, proposals
from hypothesis import given
from hypothesis import strategies as st
from plain_calibration import PlainCalibrator
from plain_tree import PlainTree

from specbranch.core.suffix_index import SuffixIndex, continuations
from specbranch.core.tree import Proposals, Signals, Tree
from specbranch.policies.calibration import Calibrator


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    largest = max(map(max, [*expected["covariance"], *expected["retrieved_covariance"]]))  # on the diagonals
    for name, value in expected.items():
        if name.endswith("covariance"):
            for row, wanted in zip(found[name], value, strict=True):
                assert row == pytest.approx(wanted, rel=1e-12, abs=1e-12 * largest)
        else:
            assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-12)


@given(st.lists(st.tuples(SIGNALS, st.booleans(), st.booleans()), max_size=200), st.lists(proposals(), max_size=5))
def test_it_learns_and_corrects_as_it_is_defined(
    labels: list[tuple[Signals, bool, bool]], asked: list[Proposals]
) -> None:
    calibrator, plain = Calibrator(), PlainCalibrator()
    for signals, accepted, covered in labels:
        calibrator.learn(signals, accepted, covered)
        plain.learn(signals, accepted, covered)
    same(calibrator.state(), plain.state())
    asked = [each for each in asked if each.signals is not None]
    if asked:
        for found, expected in zip(calibrator.correct(asked), plain.correct(asked), strict=True):
            assert found.tokens == expected.tokens
            assert found.signals == expected.signals
            assert found.confidence == pytest.approx(expected.confidence, rel=1e-11, abs=1e-300)


@given(st.data())
def test_it_observes_a_verdict_as_it_is_defined(data: st.DataObject) -> None:
    tree, plain = Tree(1, 0), PlainTree(1, 0)
    path = [0]
    for _ in range(data.draw(st.integers(0, 6))):
        if data.draw(st.booleans()):
            found = data.draw(proposals())
            tree.note(path[-1], found)
            plain.note(path[-1], found)
        token = data.draw(st.integers(-3, 9))
        if data.draw(st.booleans()):  # which is no choice, and teaches nothing
            path.append(tree.force(path[-1], [token]))
            plain.force(path[-2], [token])
        else:
            path.append(tree.add(path[-1], token, 0.5))
            plain.add(path[-2], token, 0.5)
    calibrator, defined = Calibrator(), PlainCalibrator()
    calibrator.observe(tree, path, 7)
    defined.observe(plain, path, 7)
    same(calibrator.state(), defined.state())


@given(st.data())
def test_it_knows_how_likely_retrieved_tokens_are_as_it_is_defined(data: st.DataObject) -> None:
    """Before it has learned and after, also of several texts' trees; siblings are at most sure together."""
    calibrator, defined = Calibrator(), PlainCalibrator()
    for _ in range(data.draw(st.integers(1, 6))):
        found = data.draw(found_tokens())
        chances = calibrator.chances(found)
        assert chances == pytest.approx(defined.chances(found), rel=1e-9)
        for parent in set(found.parent):
            assert sum(chances[i] for i in range(len(found)) if found.parent[i] == parent) <= 1 + 1e-9
        tree, plain = Tree(1, 0), PlainTree(1, 0)
        if data.draw(st.booleans()):
            candidates = data.draw(proposals())
            tree.note(0, candidates)
            plain.note(0, candidates)
            tree.branch(0, 2)
            plain.branch(0, 2)
        assert tree.graft(0, found, chances, 0.0) == plain.graft(0, found, chances, 0.0)
        if data.draw(st.booleans()):
            node, tokens = data.draw(st.integers(0, len(tree) - 1)), data.draw(st.lists(st.integers(0, 3), max_size=2))
            assert tree.force(node, tokens) == plain.force(node, tokens)
        path = tree.path(data.draw(st.integers(0, len(tree) - 1)))
        calibrator.observe_retrieved(tree, path, 1)
        defined.observe_retrieved(plain, path, 1)
    same(calibrator.state(), defined.state())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda calibrator: pickle.loads(pickle.dumps(calibrator)),
        lambda calibrator: restored(json.loads(json.dumps(calibrator.state()))),
        lambda calibrator: restored(json.loads(json.dumps(learned(PlainCalibrator(), 50).state()))),
    ],
)
def test_a_copy_goes_on_alike(copied: Callable[[Calibrator], Calibrator]) -> None:
    """Whoever gave the state: what was written before there was a compiled one is still read."""
    first = learned(Calibrator(), 50)
    second = copied(first)
    assert isinstance(second, Calibrator)
    same(second.state(), first.state())
    before = first.state()
    learned(second, 3)
    assert first.state() == before
    same(second.state(), learned(first, 3).state())


def restored(state: dict[str, Any]) -> Calibrator:
    calibrator = Calibrator()
    calibrator.restore(state)
    return calibrator


def learned(calibrator: Any, labels: int) -> Any:
    for i in range(labels):
        calibrator.learn(Signals(0.3 + 0.01 * (i % 50), 1.0 + i % 3, 2.0, i % 7, 0.5), i % 3 > 0, i % 2 > 0)
        tree: Any = Tree(1, 0) if isinstance(calibrator, Calibrator) else PlainTree(1, 0)
        found = continuations([SuffixIndex([1, i % 3, 1, 2, i % 2, 1]), SuffixIndex([1, 3])], [2, 1])
        tree.graft(0, found, calibrator.chances(found), 0.0)
        calibrator.observe_retrieved(tree, [0], i % 4)
    return calibrator
