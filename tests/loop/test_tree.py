"""The speculation tree against slow, obvious definitions."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import propose, tree_of

from specbranch.core.messages import Trunk
from specbranch.core.tree import Choice, Proposals, Tree

CHANCES = st.sampled_from((0.0, 0.125, 0.25, 0.5, 0.75, 1.0))  # so that ties are common


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any tree, with proposals at some nodes: those with children have the children among them or not."""
    tree = Tree(draw(st.integers(0, 9)), draw(st.integers(0, 100)))
    for _ in range(draw(st.integers(0, 23))):
        if draw(st.booleans()):
            node = draw(st.integers(0, len(tree) - 1))
            if tree.proposals[node] is None:
                tokens = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
                rest = sorted((draw(CHANCES) for _ in tokens[1:]), reverse=True)
                propose(tree, node, tokens, [draw(CHANCES), *rest])
        else:
            parent = draw(st.integers(0, len(tree) - 1))
            used = tree.tokens(tree.children[parent])
            token = draw(st.integers(0, 9).filter(lambda token, used=used: token not in used))  # type: ignore[arg-type]
            tree.add(parent, token, tree.reach[parent] * draw(st.floats(0.01, 1)))
    return tree


@given(trees(), st.data())
def test_path_and_below_are_ancestors_and_descendants(tree: Tree, data: st.DataObject) -> None:
    node = data.draw(st.integers(0, len(tree) - 1))
    path = tree.path(node)
    assert path[0] == 0
    assert path[-1] == node
    assert all(tree.parent[child] == parent for parent, child in pairwise(path))
    assert len(path) == tree.depth[node] + 1
    assert tree.below(node) == [i for i in range(len(tree)) if node in tree.path(i)]


@given(trees(), st.data())
def test_reroot_keeps_the_subtree_and_its_positions(tree: Tree, data: st.DataObject) -> None:
    node = data.draw(st.integers(0, len(tree) - 1))
    rerooted, kept = tree.reroot(node)
    assert list(kept) == tree.below(node)
    assert kept[node] == 0
    for old, new in kept.items():
        assert rerooted.token[new] == tree.token[old]
        assert rerooted.proposals[new] == tree.proposals[old]
        assert rerooted.position + rerooted.depth[new] == tree.position + tree.depth[old]
        inside = tree.path(old)[tree.depth[node] :]
        assert rerooted.path(new) == [kept[i] for i in inside]
        if tree.reach[node] > 0:
            assert rerooted.reach[new] == pytest.approx(tree.reach[old] / tree.reach[node])


@given(trees(), st.integers(1, 9), st.integers(1, 6), st.integers(1, 4), st.data())
def test_the_frontier_gives_the_likeliest_as_a_scan_of_everything_does(
    tree: Tree, count: int, depth: int, ranks: int, data: st.DataObject
) -> None:
    """Asked again and again while the tree grows, with other numbers each time."""
    for _ in range(4):
        outcomes = tree.undrafted(depth)
        for node in range(len(tree)):
            if tree.depth[node] < depth:
                outcomes += [outcome for outcome in tree.untried(node, ranks) if outcome[0] > 0]
        outcomes.sort(key=lambda outcome: (-outcome[0], outcome[1]))
        found = tree.likeliest(count, depth, ranks)
        assert found == outcomes[:count]
        for _, choice in found[: data.draw(st.integers(0, 2))]:
            node = tree.take(choice)
            if data.draw(st.booleans()):
                propose(tree, node, [3, 1, 4], [data.draw(CHANCES), 0.25, 0.125])
        count, ranks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))


@given(trees(), st.data())
def test_a_trunk_is_the_chosen_part_of_the_tree_in_integers(tree: Tree, data: st.DataObject) -> None:
    nodes = [0]
    for node in range(1, len(tree)):
        if tree.parent[node] in nodes and data.draw(st.booleans()):
            nodes.append(node)
    trunk = Trunk.of(tree, tuple(nodes))
    assert list(trunk.tokens) == tree.tokens(nodes)
    assert [nodes[parent] if parent >= 0 else -1 for parent in trunk.parents] == [tree.parent[node] for node in nodes]
    assert trunk.positions == [tree.position + tree.depth[node] for node in nodes]


def test_branch_adds_the_first_candidates_once() -> None:
    tree = Tree(7, 3)
    propose(tree, 0, (5, 6, 8), (0.5, 0.25, 0.125))
    tree.branch(0, 1)
    assert tree.tokens(tree.children[0]) == [5]
    tree.branch(0, 3)
    assert tree.tokens(tree.children[0]) == [5, 6, 8]
    tree.branch(0, 3)
    assert len(tree) == 4
    assert [tree.reach[child] for child in tree.children[0]] == [0.5, 0.25, 0.125]
    assert tree.child(0, 6) == 2
    assert tree.child(0, 9) is None


def test_candidates_before_there_are_any_are_refused() -> None:
    with pytest.raises(ValueError, match="node 0 has no proposals"):
        Tree(1, 0).branch(0, 2)
    with pytest.raises(ValueError, match="node 0 has no proposals"):
        Tree(1, 0).take(Choice(0, 1))


def test_best_path_follows_the_likeliest_child() -> None:
    tree = tree_of((1, 0, 0.2), (2, 0, 0.7), (3, 1, 0.2), (4, 2, 0.1), (5, 2, 0.3))
    assert tree.best_path() == [0, 2, 5]
    assert tree.best_path(1) == [1, 3]


def test_descending_is_noting_and_taking_step_by_step() -> None:
    def row(*tokens: tuple[int, int]) -> list[Proposals]:
        return [Proposals(pair, (0.5, 0.25)) for pair in tokens]

    def start() -> Tree:
        tree = Tree(1, 0)
        propose(tree, 0, (2, 3), (0.5, 0.25))
        tree.branch(0, 2)
        return tree

    found = [row((4, 5), (6, 7)), row((8, 9), (10, 11)), row((12, 13), (14, 15))]
    deep, steps = start(), start()
    assert deep.descend([1, 2], found) == [1, 2, 3, 4, 5, 6]
    for below, proposals in zip(([1, 2], [3, 4], [5, 6]), found, strict=True):
        for node, noted in zip(below, proposals, strict=True):
            steps.note(node, noted)
        if below != [5, 6]:
            assert [steps.take(Choice(node, 0)) for node in below] == [below[0] + 2, below[1] + 2]
    for column in ("token", "parent", "depth", "reach", "proposals", "children"):
        assert getattr(deep, column) == getattr(steps, column)
    assert deep.tokens(deep.path(6)) == [1, 3, 6, 10]
    assert deep.reach[6] == 0.25 * 0.5 * 0.5
