"""The speculation tree against slow, obvious definitions."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbranch.core.tree import Node, Proposals, Tree


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    count = draw(st.integers(1, 24))
    nodes = [Node(draw(st.integers(0, 9)))]
    for i in range(1, count):
        parent = draw(st.integers(0, i - 1))
        reach = nodes[parent].reach * draw(st.floats(0.01, 1))
        nodes.append(Node(draw(st.integers(0, 9)), parent, nodes[parent].depth + 1, reach))
    return Tree(tuple(nodes), draw(st.integers(0, 100)))


@given(trees(), st.data())
def test_path_and_below_are_ancestors_and_descendants(tree: Tree, data: st.DataObject) -> None:
    node = data.draw(st.integers(0, len(tree) - 1))
    path = tree.path(node)
    assert path[0] == 0
    assert path[-1] == node
    assert all(tree.nodes[child].parent == parent for parent, child in pairwise(path))
    assert len(path) == tree.nodes[node].depth + 1
    assert tree.below(node) == [i for i in range(len(tree)) if node in tree.path(i)]


@given(trees(), st.data())
def test_reroot_keeps_the_subtree_and_its_positions(tree: Tree, data: st.DataObject) -> None:
    node = data.draw(st.integers(0, len(tree) - 1))
    rerooted, kept = tree.reroot(node)
    assert list(kept) == tree.below(node)
    assert kept[node] == 0
    for old, new in kept.items():
        assert rerooted.nodes[new].token == tree.nodes[old].token
        assert rerooted.position + rerooted.nodes[new].depth == tree.position + tree.nodes[old].depth
        inside = tree.path(old)[tree.nodes[node].depth :]
        assert rerooted.path(new) == tuple(kept[i] for i in inside)
        assert rerooted.nodes[new].reach == pytest.approx(tree.nodes[old].reach / tree.nodes[node].reach)


def test_branch_adds_the_first_candidates_once() -> None:
    tree = Tree.rooted(7, 3).propose({0: Proposals((5, 6, 8), (0.5, 0.25, 0.125))})
    one = tree.branch({0: 1})
    three = one.branch({0: 3})
    assert one.tokens(one.children(0)) == [5]
    assert three.tokens(three.children(0)) == [5, 6, 8]
    assert three.branch({0: 3}) is three
    assert [three.nodes[i].reach for i in three.children(0)] == [0.5, 0.25, 0.125]
    assert three.child(0, 6) == 2
    assert three.child(0, 9) is None


def test_branch_without_proposals_is_refused() -> None:
    with pytest.raises(ValueError, match="no proposals"):
        Tree.rooted(1, 0).branch({0: 2})


def test_best_path_follows_the_likeliest_child() -> None:
    tree = Tree(
        (Node(0), Node(1, 0, 1, 0.2), Node(2, 0, 1, 0.7), Node(3, 1, 2, 0.2), Node(4, 2, 2, 0.1), Node(5, 2, 2, 0.3)), 0
    )
    assert tree.best_path() == (0, 2, 5)
    assert tree.best_path(1) == (1, 3)


def test_descending_is_proposing_and_adopting_step_by_step() -> None:
    def said(*tokens: int) -> Proposals:
        return Proposals(tokens, (0.5, 0.25))

    tree = Tree.rooted(1, 0).propose({0: said(2, 3)}).branch({0: 2})
    found = [[said(4, 5), said(6, 7)], [said(8, 9), said(10, 11)], [said(12, 13), said(14, 15)]]
    deep, nodes = tree.descend([1, 2], found)
    assert nodes == [1, 2, 3, 4, 5, 6]
    steps = tree
    for below, proposals in zip(([1, 2], [3, 4], [5, 6]), found, strict=True):
        steps = steps.propose(dict(zip(below, proposals, strict=True)))
        if below != [5, 6]:
            steps = steps.adopt_all((node, 0) for node in below)
    assert deep == steps
    assert deep.tokens(deep.path(6)) == [1, 3, 6, 10]
    assert deep.nodes[6].reach == 0.25 * 0.5 * 0.5
