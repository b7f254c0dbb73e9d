"""The compiled tree and calibration against their definitions in Python: the tree to the last bit, whatever it has gone
through, and the calibration as far as sums in another order allow."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from checked_loop import Case
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from plain_calibration import PlainCalibrator
from plain_tree import PlainTree

from specbranch import decoding
from specbranch.core.suffix_index import Continuations, SuffixIndex, continuations
from specbranch.core.tree import Choice, ProposalRows, Proposals, Signals, Tree
from specbranch.policies.calibration import Calibrator
from specbranch.policies.costs import Costs
from specbranch.policies.methods import METHODS

CHANCES = st.one_of(st.sampled_from((0.0, 0.25, 0.5, 1.0)), st.floats(0, 1, allow_subnormal=False))  # ties are common
COLUMNS = ("token", "parent", "depth", "reach", "proposals", "children")
SIGNALS = st.builds(
    Signals,
    st.floats(0, 1),
    st.floats(0, 12),
    st.one_of(st.floats(0, 40), st.just(math.inf)),
    st.integers(0, 40),
    st.floats(-7, 7),
    st.floats(-7, 7),
)


@st.composite
def proposals(draw: st.DrawFn) -> Proposals:
    tokens = draw(st.lists(st.integers(-3, 9), min_size=1, max_size=5, unique=True))
    return Proposals(tuple(tokens), tuple(draw(CHANCES) for _ in tokens), draw(st.none() | SIGNALS))


TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=24)  # which repeat themselves


@st.composite
def found_tokens(draw: st.DrawFn) -> Continuations:
    """What followed the end of a text, of which some is drafted, in itself and in another text."""
    text, drafted = draw(TEXTS), draw(st.lists(st.integers(0, 3), max_size=2))
    near = draw(st.none() | st.tuples(st.integers(0, 1), st.integers(0, 9), st.integers(9, 24)))
    limits = {"depth": draw(st.integers(1, 8)), "most_nodes": draw(st.integers(1, 12))}
    return continuations(
        [SuffixIndex(text), SuffixIndex(draw(TEXTS))], [*text, *drafted], len(drafted), near=near, **limits
    )


def outcome(run: Callable[[], Any]) -> Any:
    """What a call gives, or which error it raises."""
    try:
        return run()
    except (ValueError, IndexError) as error:
        return type(error), str(error) if isinstance(error, ValueError) else ""


class Trees(RuleBasedStateMachine):
    """Two trees that go through the same."""

    @initialize(token=st.integers(0, 9), position=st.integers(0, 100))
    def begin(self, token: int, position: int) -> None:
        self.tree, self.plain = Tree(token, position), PlainTree(token, position)

    def node(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.plain) - 1), "node")

    def choice(self, data: st.DataObject) -> Choice:
        return Choice(self.node(data), data.draw(st.integers(-1, 4), "rank"))

    def both(self, name: str, *arguments: Any) -> Any:
        """The same call of both; they answer alike."""
        found = outcome(lambda: getattr(self.tree, name)(*arguments))
        assert found == outcome(lambda: getattr(self.plain, name)(*arguments))
        return found

    def check(self) -> None:
        assert len(self.tree) == len(self.plain)
        assert self.tree.position == self.plain.position
        for column in COLUMNS:
            assert list(getattr(self.tree, column)) == getattr(self.plain, column)
        self.both("free_nodes")
        for node in range(len(self.plain)):
            self.both("retrieved", node)

    @rule(data=st.data(), token=st.integers(-3, 9), reach=CHANCES)
    def add(self, data: st.DataObject, token: int, reach: float) -> None:
        self.both("add", self.node(data), token, reach)
        self.check()

    @rule(data=st.data(), found=proposals())
    def note(self, data: st.DataObject, found: Proposals) -> None:
        """Also where there are some already, as long as none is lost that stands in the frontier."""
        node = self.node(data)
        before = self.plain.proposals[node]
        if before is None or len(found.tokens) >= len(before.tokens):
            known = before is not None and any(map(self.plain.retrieved, self.plain.children[node]))
            if not known:  # else chances of 0 are divided by
                self.both("note", node, found)
                self.check_related(node, found)
        self.check()

    def check_related(self, node: int, found: Proposals) -> None:
        """What was retrieved at a node is as likely as the draft says, or that it is wrong."""
        for child in filter(self.tree.retrieved, self.tree.children[node]):
            token, chance = self.tree.token[child], 1 - sum(found.confidence)
            if token in found.tokens:
                chance = found.confidence[found.tokens.index(token)]
                if self.tree.reach[child] > 1e-300:
                    assert self.tree.reach[child] == pytest.approx(self.tree.reach[node] * chance, rel=1e-9)
            assert self.tree.reach[child] <= self.tree.reach[node] * max(0.0, chance) * (1 + 1e-9) + 1e-300

    @rule(data=st.data(), found=found_tokens(), least=CHANCES, depth=st.integers(0, 12))
    def graft(self, data: st.DataObject, found: Continuations, least: float, depth: int) -> None:
        node, size = self.node(data), len(self.tree)
        chances = [data.draw(st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-3, 1))) for _ in found.token]
        added = self.both("graft", node, found, chances, least, depth)
        assert added == len(self.tree) - size
        for new in range(size, len(self.tree)):
            assert self.tree.retrieved(new)
            assert new in self.tree.free_nodes()
            assert self.tree.depth[new] <= depth
            assert self.tree.reach[new] >= least
        for parent in {self.tree.parent[new] for new in range(size, len(self.tree))}:
            tokens = self.tree.tokens([new for new in self.tree.children[parent] if new >= size])
            assert len(tokens) == len(set(tokens))
        self.check()

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        nodes = [self.node(data) for _ in range(data.draw(st.integers(0, 4)))]
        free = len(self.tree.free_nodes())
        assert self.both("use", nodes) == free - len(self.tree.free_nodes())
        assert not {*nodes} & {*self.tree.free_nodes()}
        self.check()

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        self.both("take", self.choice(data))
        self.both("take_all", [self.choice(data) for _ in range(2)])
        self.check()

    @rule(data=st.data(), width=st.integers(0, 5))
    def branch(self, data: st.DataObject, width: int) -> None:
        self.both("branch", self.node(data), width)
        self.check()

    @rule(data=st.data(), steps=st.integers(0, 3))
    def descend(self, data: st.DataObject, steps: int) -> None:
        fresh = [node for node, found in enumerate(self.plain.proposals) if found is None]
        nodes = data.draw(st.lists(st.sampled_from(fresh), max_size=3, unique=True)) if fresh else []
        self.both("descend", nodes, [[data.draw(proposals()) for _ in nodes] for _ in range(steps)])
        self.check()

    @rule(count=st.integers(0, 9), depth=st.integers(0, 6), ranks=st.integers(0, 5), data=st.data())
    def likeliest(self, count: int, depth: int, ranks: int, data: st.DataObject) -> None:
        found = self.both("likeliest", count, depth, ranks)
        assert len({choice for _, choice in found}) == len(found), "a place twice"
        assert [reach for reach, _ in found] == [self.plain.reach_of(choice) for _, choice in found], "an old reach"
        every = self.both("likeliest", 10**6, depth, 0)
        assert sorted(choice for _, choice in every) == sorted(choice for _, choice in self.plain.undrafted(depth))
        for _, choice in found[: data.draw(st.integers(0, 3))]:
            self.both("take", choice)
        self.check()

    @precondition(lambda self: len(self.plain) > 4)
    @rule(data=st.data())
    def reroot(self, data: st.DataObject) -> None:
        node = self.node(data)
        before = self.tree
        (self.tree, kept), (self.plain, expected) = self.tree.reroot(node), self.plain.reroot(node)
        assert list(kept.items()) == list(expected.items())
        for old, new in kept.items():
            if new:
                assert before.retrieved(old) == self.tree.retrieved(new)
                assert (old in before.free_nodes()) == (new in self.tree.free_nodes())
        self.check()

    @rule(data=st.data(), token=st.integers(-3, 9), ranks=st.integers(0, 5), depth=st.integers(0, 6), least=CHANCES)
    def ask(self, data: st.DataObject, token: int, ranks: int, depth: int, least: float) -> None:
        node = self.node(data)
        for name in ("path", "best_path", "best_choices", "below"):
            self.both(name, node)
        self.both("child", node, token)
        self.both("untried", node, ranks)
        self.both("offers", node, ranks, least)
        self.both("undrafted", depth)
        self.both("tokens", range(len(self.plain)))
        choices = [self.choice(data) for _ in range(3)]
        for name in ("reach_of", "chance_of", "depth_of"):
            for choice in choices:
                self.both(name, choice)
        for name in ("reaches", "chances", "deepest"):
            self.both(name, choices)
        for each in (token, *range(4)):
            self.both("retrieved_odds", node, each)
        for path in (choices, self.plain.best_choices(node), [Choice(each) for each in self.plain.path(node)]):
            self.both("read", path)
        self.check_unread([choice for choice in choices if choice.rank < 0 or self.plain.proposals[choice.node]])

    def check_unread(self, choices: list[Choice]) -> None:
        every = self.both("with_unread", choices)
        nodes = [choice.node for choice in every if choice.rank < 0]
        assert len(nodes) == len(set(nodes)), "a node twice"
        assert {*choices} <= {*every}
        for place, choice in enumerate(every):
            above = self.plain.parent[choice.node] if choice.rank < 0 else choice.node
            read = above < 0 or self.plain.proposals[above] is not None
            assert read or Choice(above) in every[:place], "a node before its parent"

    @rule(data=st.data(), width=st.integers(1, 3))
    def relate(self, data: st.DataObject, width: int) -> None:
        """The first step of a run says what was retrieved for its candidate, those behind it say nothing."""
        nodes, token = [self.node(data) for _ in range(width)], data.draw(st.integers(0, 3))
        rows = ProposalRows()
        for _ in range(2):
            rows.add(
                [[token, 4]] * width, [[1.0, 0.5]] * width, [[0.5, 0.25]] * width, [1.0] * width, [0] * width, (0, 0)
            )
        self.tree.relate(rows, nodes)
        said = [[found.signals.retrieved for found in step if found.signals is not None] for step in rows]
        assert said == [[self.plain.retrieved_odds(node, token) for node in nodes], [0.0] * width]


TestTrees = Trees.TestCase


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_goes_the_same_way_over_either_tree(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(30):
        case = Case.draw(seed, method, None)
        stats = case.run(Costs())
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "Tree", PlainTree)
            assert case.run(Costs()) == stats


# ---- Wrong arguments


def small() -> Tree:
    tree = Tree(1, 0)
    tree.note(0, Proposals((5, 6), (0.5, 0.25)))
    tree.branch(0, 1)
    return tree


@pytest.mark.parametrize(
    "call",
    [
        lambda tree, node: tree.add(node, 1, 0.5),
        lambda tree, node: tree.take(Choice(node)),
        lambda tree, node: tree.take(Choice(node, 0)),
        lambda tree, node: tree.take_all([Choice(0), Choice(node)]),
        lambda tree, node: tree.note(node, Proposals((1,), (1.0,))),
        lambda tree, node: tree.descend([node], [[Proposals((1,), (1.0,))]]),
        lambda tree, node: tree.branch(node, 1),
        lambda tree, node: tree.tokens([0, node]),
        lambda tree, node: tree.child(node, 1),
        lambda tree, node: tree.path(node),
        lambda tree, node: tree.best_path(node),
        lambda tree, node: tree.best_choices(node),
        lambda tree, node: tree.below(node),
        lambda tree, node: tree.depth_of(Choice(node)),
        lambda tree, node: tree.reach_of(Choice(node)),
        lambda tree, node: tree.chance_of(Choice(node, 0)),
        lambda tree, node: tree.untried(node, 1),
        lambda tree, node: tree.offers(node, 1, 0.0),
        lambda tree, node: tree.children[node if node > 0 else -3],
        lambda tree, node: tree.proposals[node if node > 0 else -3],
        lambda tree, node: tree.graft(node, followed(), [1.0], 0.0, 9),
        lambda tree, node: tree.use([0, node]),
        lambda tree, node: tree.retrieved(node),
        lambda tree, node: tree.retrieved_odds(node, 1),
        lambda tree, node: tree.with_unread([Choice(0), Choice(node)]),
        lambda tree, node: tree.read([Choice(0), Choice(node)]),
        lambda tree, node: tree.relate(run(), [node]),
        lambda tree, node: Calibrator().observe_retrieved(tree, [0, node], 1),
        lambda tree, node: Tree(1, 0).adopt(tree, node),
        lambda tree, node: Calibrator().observe(tree, [0, node], 1),
    ],
)
@pytest.mark.parametrize("node", [-1, 2, 2**62, -(2**62)])
def test_a_node_that_is_none_is_refused(call: Callable[[Tree, int], object], node: int) -> None:
    tree = small()
    with pytest.raises(IndexError):
        call(tree, node)
    assert len(tree) == 2


def test_a_rank_that_no_candidate_has_is_refused() -> None:
    for call in (Tree.take, Tree.reach_of, Tree.chance_of):
        with pytest.raises(IndexError, match="rank 2: node 0 has 2 candidates"):
            call(small(), Choice(0, 2))


def followed() -> Continuations:
    """One token."""
    return continuations([SuffixIndex([1, 2]), SuffixIndex([3, 4])], [3], depth=1)


def run() -> ProposalRows:
    rows = ProposalRows()
    rows.add(**STEP)
    return rows


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Tree(1, 0).note(0, Proposals((1, 2), (1.0,))), "confidence in each of 2 tokens, got 1"),
        (lambda: Tree(1, 0).note(0, ((1,), (1.0,))), "expected a Proposals"),  # type: ignore[arg-type]
        (lambda: Tree(1, 0).note(0, Proposals((1,), (1.0,), (1.0,))), "expected a Signals"),  # type: ignore[arg-type]
        (lambda: Tree(1, 0).descend([0], [[]]), "expected 1 in each step, one for each node, got 0"),
        (lambda: Tree(1, 0).descend([0], [[Proposals((1,), (1.0,))], []]), "expected 1 in each step"),
        (lambda: Tree(1, 0).descend([0, 0], run()), "expected 2 in each step, one for each node, got 1"),
        (lambda: small().adopt(small(), 0), "a tree with a root only"),
        (lambda: Calibrator().correct([Proposals((1,), (1.0,))]), "some with signals"),
        (lambda: Calibrator().correct([Proposals((), (), Signals(0.5, 1, 1, 0))]), "expected candidates"),
        (lambda: Calibrator().observe(small(), [], 1), "the root at least"),
        (lambda: Calibrator().observe_retrieved(small(), [], 1), "the root at least"),
        (lambda: small().graft(0, followed(), [], 0.0, 9), "one for each of 1 tokens that were found, got 0"),
        (lambda: small().relate(run(), []), "expected 0 in each step"),
        (lambda: Calibrator().restore({"weights": [1.0, 2.0]}), "another shape or type of weights"),
        (lambda: Calibrator().restore({"magic": 1}), "what no calibrator has learned"),
    ],
)
def test_wrong_values_are_refused_by_name(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_values_of_another_type_are_refused() -> None:
    tokens: Any = []

    class Clearing:
        def __index__(self) -> int:
            tokens.clear()
            return 1

    tokens += [Clearing(), 2]
    with pytest.raises(IndexError, match="became shorter"):
        Tree(1, 0).note(0, Proposals(tokens, (0.5, 0.5)))
    for wrong in ("x", 1.5, None):
        with pytest.raises(TypeError):
            Tree(1, 0).note(0, Proposals((wrong,), (0.5,)))  # type: ignore[arg-type]
    for choice in ((0,), [0, 1], None):
        with pytest.raises(TypeError):
            Tree(1, 0).take(choice)  # type: ignore[arg-type]


# ---- A draft's run


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


STEP: dict[str, Any] = {
    "tokens": [[1, 2]],
    "scores": [[1.0, 0.5]],
    "confidence": [[0.5, 0.25]],
    "entropy": [1.0],
    "depths": [0],
    "forecast": (0.0, 0.0),
}


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
    rows = run()
    with pytest.raises(ValueError, match=said):
        rows.add(**{**STEP, **changed})
    assert len(rows) == 1
    with pytest.raises(IndexError):
        rows[1]


# ---- Calibration


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
        assert tree.graft(0, found, chances, 0.0, 9) == plain.graft(0, found, chances, 0.0, 9)
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
        tree.graft(0, found, calibrator.chances(found), 0.0, 9)
        calibrator.observe_retrieved(tree, [0], i % 4)
    return calibrator
