"""The compiled tree against its definition in Python, to the last bit, whatever it has gone through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from checked_loop import Case
from drawn_trees import CHANCES, found_tokens, proposals
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from plain_tree import PlainTree
from trees import run_of_one_row

from specbranch import decoding
from specbranch.core.suffix_index import Continuations, SuffixIndex, continuations
from specbranch.core.tree import Choice, ProposalRows, Proposals, Signals, Tree
from specbranch.policies.calibration import Calibrator
from specbranch.policies.costs import Costs
from specbranch.policies.methods import METHODS

COLUMNS = ("token", "parent", "depth", "reach", "proposals", "children")


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
            for name in ("retrieved", "forced", "is_bound"):
                self.both(name, node)

    @rule(data=st.data(), token=st.integers(-3, 9), reach=CHANCES, free=st.booleans())
    def add(self, data: st.DataObject, token: int, reach: float, free: bool) -> None:
        self.both("add", self.node(data), token, reach, free)
        self.check()

    @rule(data=st.data(), tokens=st.lists(st.integers(-3, 9), max_size=4))
    def force(self, data: st.DataObject, tokens: list[int]) -> None:
        node, size = self.node(data), len(self.tree)
        last = self.both("force", node, tokens)
        path = self.tree.path(last)[len(self.tree.path(node)) :]
        assert self.tree.tokens(path) == tokens
        assert all(map(self.tree.forced, path))
        assert {*range(size, len(self.tree))} <= {*self.tree.free_nodes()}
        for each in path:
            assert self.tree.reach[each] in (0.0, pytest.approx(self.tree.reach[node], rel=1e-9))
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
                if self.tree.reach[child] > 1e-300 and not self.tree.forced(child):
                    assert self.tree.reach[child] == pytest.approx(self.tree.reach[node] * chance, rel=1e-9)
            if not self.tree.forced(child):
                assert self.tree.reach[child] <= self.tree.reach[node] * max(0.0, chance) * (1 + 1e-9) + 1e-300

    @rule(data=st.data(), found=found_tokens(), least=CHANCES)
    def graft(self, data: st.DataObject, found: Continuations, least: float) -> None:
        node, size = self.node(data), len(self.tree)
        chances = [data.draw(st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-3, 1))) for _ in found.token]
        added = self.both("graft", node, found, chances, least)
        assert added == len(self.tree) - size
        for new in range(size, len(self.tree)):
            assert self.tree.retrieved(new)
            assert new in self.tree.free_nodes()
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
                assert before.forced(old) == self.tree.forced(new)
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
        lambda tree, node: tree.force(node, [1]),
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
        lambda tree, node: tree.graft(node, followed(), [1.0], 0.0),
        lambda tree, node: tree.use([0, node]),
        lambda tree, node: tree.retrieved(node),
        lambda tree, node: tree.forced(node),
        lambda tree, node: tree.is_bound(node),
        lambda tree, node: tree.retrieved_odds(node, 1),
        lambda tree, node: tree.with_unread([Choice(0), Choice(node)]),
        lambda tree, node: tree.read([Choice(0), Choice(node)]),
        lambda tree, node: tree.relate(run_of_one_row(), [node]),
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


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Tree(1, 0).note(0, Proposals((1, 2), (1.0,))), "confidence in each of 2 tokens, got 1"),
        (lambda: Tree(1, 0).note(0, ((1,), (1.0,))), "expected a Proposals"),  # type: ignore[arg-type]
        (lambda: Tree(1, 0).note(0, Proposals((1,), (1.0,), (1.0,))), "expected a Signals"),  # type: ignore[arg-type]
        (lambda: Tree(1, 0).descend([0], [[]]), "expected 1 in each step, one for each node, got 0"),
        (lambda: Tree(1, 0).descend([0], [[Proposals((1,), (1.0,))], []]), "expected 1 in each step"),
        (lambda: Tree(1, 0).descend([0, 0], run_of_one_row()), "expected 2 in each step, one for each node, got 1"),
        (lambda: small().adopt(small(), 0), "a tree with a root only"),
        (lambda: Calibrator().correct([Proposals((1,), (1.0,))]), "some with signals"),
        (lambda: Calibrator().correct([Proposals((), (), Signals(0.5, 1, 1, 0))]), "expected candidates"),
        (lambda: Calibrator().observe(small(), [], 1), "the root at least"),
        (lambda: Calibrator().observe_retrieved(small(), [], 1), "the root at least"),
        (lambda: small().graft(0, followed(), [], 0.0), "one for each of 1 tokens that were found, got 0"),
        (lambda: small().relate(run_of_one_row(), []), "expected 0 in each step"),
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
