"""Policies as pure functions: what they cut, where they branch, when they stop drafting."""

import pytest

from specbranch import METHODS, SpecBranchError
from specbranch.branching import SpecBranch
from specbranch.chains import Autoregressive, Pearl, Speculative
from specbranch.costs import ModeCosts
from specbranch.methods import make_policy
from specbranch.policy import Situation
from specbranch.tree import Proposals, Tree


def chain(*confidence: float, candidates: int = 6) -> Tree:
    """A drafted chain with these confidences; every node but the last has proposals."""
    tree = Tree.rooted(0, 10)
    for depth, chance in enumerate(confidence):
        rest = [(1 - chance) / candidates] * (candidates - 1)
        tokens = tuple(range(depth * 10, depth * 10 + candidates))
        tree = tree.propose(depth, Proposals(tokens, (chance, *rest))).branch(depth, 1)
    return tree


def costs(target: float = 0.23, draft: float = 0.1, per_row: float = 0.0, value: float = 0.14) -> ModeCosts:
    mode = ModeCosts()
    for rows in (1, 1, 2, 5):
        mode.target.record(rows, target + per_row * rows)
        mode.draft.record(1, draft)
    mode.rounds, mode.seconds, mode.tokens = 9, value, 1.0
    return mode


def situation(overlapped: bool = False, remaining: int = 99, acceptance: float = 0.9, **kwargs: float) -> Situation:
    return Situation(overlapped, costs(**kwargs), acceptance, remaining)


def test_chain_policies_draft_their_length_and_no_further_than_needed() -> None:
    assert Autoregressive().before(chain(), situation()) == []
    assert Speculative(3).before(chain(0.1, 0.1), situation()) == [2]
    assert Speculative(3).before(chain(0.1, 0.1, 0.1), situation()) == []
    assert Speculative(3).before(chain(0.9), situation(remaining=2)) == []
    assert Pearl(4).before(chain(), situation(overlapped=True)) == []
    cut = Pearl(4).cut(chain(0.9, 0.9), situation(overlapped=True))
    assert cut.trunk == (0, 1, 2)
    assert Pearl(4).during(cut, cut.tree) == [2]


def test_a_trunk_never_outruns_the_tokens_that_may_be_committed() -> None:
    tree = chain(0.9, 0.9, 0.9, 0.9)
    for policy in (Speculative(), Pearl(), SpecBranch()):
        for remaining in (1, 2, 3):
            trunk = policy.cut(tree, situation(remaining=remaining)).trunk
            assert max(tree.nodes[i].depth for i in trunk if i < len(tree)) < remaining


def test_specbranch_drafts_while_the_next_token_is_worth_its_step() -> None:
    policy = SpecBranch()
    assert policy.before(chain(), situation()) == [0]
    assert policy.before(chain(0.95), situation()) == [1]  # 0.95 * 0.9 * 0.14 s > 0.1 s
    assert policy.before(chain(0.7), situation()) == []
    assert policy.before(chain(0.7), situation(draft=0.01)) == [1]
    assert policy.before(chain(0.99, 0.99), situation(overlapped=True)) == []  # a hit: the target starts at once
    assert SpecBranch(max_trunk=2).before(chain(0.99, 0.99), situation(draft=0.001)) == []


@pytest.mark.parametrize(("confidence", "branches"), [(0.65, 2), (0.4, 3), (0.05, 5)])
def test_branches_at_the_first_unsure_position(confidence: float, branches: int) -> None:
    """k = max(1, floor(k_max * (1 - confidence))), the drafted tail being branch 1."""
    policy = SpecBranch(epsilon=0.7, k_max=6)
    tree = chain(0.95, confidence, 0.9)
    cut = policy.cut(tree, situation(overlapped=True))
    assert cut.branch_point == 1
    assert len(cut.tree.children(1)) == branches
    assert cut.trunk == (0, 1, 2, 3)  # the tail is verified too
    assert set(policy.during(cut, cut.tree)) == {3, *(i for i in cut.tree.children(1) if i != 2)}
    paper = SpecBranch(epsilon=0.7, k_max=6, verify_tail=False).cut(tree, situation(overlapped=True))
    assert paper.trunk == (0, 1)


def test_a_sure_trunk_branches_at_its_end() -> None:
    policy = SpecBranch(epsilon=0.5)
    cut = policy.cut(chain(0.9, 0.8), situation(overlapped=True))
    assert cut.branch_point == cut.trunk[-1] == 2
    assert policy.during(cut, cut.tree) == [2]
    tree = cut.tree.propose(2, Proposals((1, 2, 3, 4, 5, 6), (0.3, 0.2, 0.1, 0.1, 0.1, 0.1)))
    assert policy.width(tree, 2, cut.branch_point) == 4
    assert policy.width(tree, 1, cut.branch_point) == 1


def test_serial_branches_are_verified_where_a_row_pays() -> None:
    tree = chain(0.9, 0.4, 0.9)
    assert len(SpecBranch().cut(tree, situation(per_row=0.0)).trunk) == 6
    assert len(SpecBranch().cut(tree, situation(per_row=0.1)).trunk) == 4


def test_methods_and_options() -> None:
    assert [make_policy(method, {}).name for method in METHODS] == list(METHODS)
    assert make_policy("speculative", {"length": 3, "k_max": 2}) == Speculative(3)
    with pytest.raises(SpecBranchError, match="unknown method 'magic'; expected one of autoregressive"):
        make_policy("magic", {})
    with pytest.raises(SpecBranchError, match="unknown option 'lenght'"):
        make_policy("specbranch", {"lenght": 3})
    with pytest.raises(SpecBranchError, match="epsilon"):
        make_policy("specbranch", {"epsilon": 2.0})
