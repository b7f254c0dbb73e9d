"""ancestor_mask against a walk up the tree for every node."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from implementations import on_cpu

from specbranch_ext import ancestor_mask, reference

pytestmark = pytest.mark.usefixtures("implementation")


def check(parents: list[int]) -> None:
    n = len(parents)
    tensor = torch.tensor(parents, dtype=torch.int64)
    ancestors, depths = ancestor_mask(tensor)
    assert ancestors.dtype == depths.dtype == torch.int64
    assert ancestors.shape == (n, -(-n // 64))
    assert depths.shape == (n,)
    for node in range(n):
        path = set()
        above = node
        while above >= 0:
            path.add(above)
            above = parents[above]
        words = ancestors[node].tolist()
        seen = {64 * w + b for w, word in enumerate(words) for b in range(64) if word >> b & 1}
        assert seen == path
        assert depths[node] == len(path) - 1
    expected = reference.ancestor_mask(tensor)
    assert torch.equal(ancestors, expected.ancestors)
    assert torch.equal(depths, expected.depths)


def test_every_tree_of_up_to_five_nodes():
    for n in range(6):
        for parents in itertools.product(*(range(-1, i) for i in range(n))):
            check(list(parents))


@given(data=st.data())
def test_random_trees_over_several_words(data):
    n = data.draw(st.integers(1, 150))
    check([data.draw(st.integers(-1, i - 1)) for i in range(n)])


@pytest.mark.parametrize("n", [63, 64, 65, 128, 129, 200])
def test_chains_and_stars_at_word_boundaries(n):
    check(list(range(-1, n - 1)))
    check([-1] + [0] * (n - 1))
    check([-1] * n)


@on_cpu
@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([-1, 2, 0], "parents: expected an earlier node or -1 for node 1, got 2"),
        ([0], "parents: expected an earlier node or -1 for node 0, got 0"),
        ([-1, -2], "parents: expected an earlier node or -1 for node 1, got -2"),
        ([-1, 0, 2**40], "for node 2"),
    ],
)
def test_a_parent_must_come_before_its_child(parents, message):
    for function in (ancestor_mask, reference.ancestor_mask):
        with pytest.raises(ValueError, match=message):
            function(torch.tensor(parents))


@on_cpu
@pytest.mark.parametrize(
    ("parents", "message"),
    [
        (torch.tensor([[-1]]), "parents: expected int64 of shape \\[n\\]"),
        (torch.tensor([-1.0]), "parents: expected int64"),
        (torch.tensor([-1, 0, 1, 2])[::2], "parents: expected a contiguous"),
    ],
)
def test_bad_input(parents, message):
    with pytest.raises(ValueError, match=message):
        ancestor_mask(parents)


def test_registration():
    torch.library.opcheck(torch.ops.specbranch.ancestor_mask.default, (torch.tensor([-1, 0, 0, 2]),))
