"""Policies as pure functions: what they cut, where they branch, when they stop drafting."""

from collections.abc import Callable

import pytest

from specbranch import METHODS, SpecBranchError
from specbranch.core.tree import Proposals, Tree
from specbranch.policies.branching import PaperSpecBranch, SpecBranch, Ssd
from specbranch.policies.chain import Adaptive, Autoregressive, Pearl, Speculative
from specbranch.policies.costs import ModeCosts
from specbranch.policies.methods import make_policy
from specbranch.policies.policy import Rest, Situation
from specbranch.runtime.hrad.predictor import Outlook

CANDIDATES = 6


def proposals(depth: int, chance: float) -> Proposals:
    """Candidates 10 * depth, 10 * depth + 1, …: the first with this chance, the others sharing half the rest."""
    rest = [(1 - chance) / 2 / (CANDIDATES - 1)] * (CANDIDATES - 1)
    return Proposals(tuple(range(depth * 10, depth * 10 + CANDIDATES)), (chance, *rest))


def chain(*chances: float) -> Tree:
    """A drafted chain with these chances; every node but the last has proposals."""
    tree = Tree.rooted(0, 10)
    for depth, chance in enumerate(chances):
        tree = tree.propose({depth: proposals(depth, chance)}).branch({depth: 1})
    return tree


def costs(target: float = 0.23, draft: float = 0.1, per_row: float = 0.0, value: float = 0.14) -> ModeCosts:
    """value: seconds that a committed token is worth."""
    mode = ModeCosts()
    for rows in (1, 1, 2, 5):
        mode.target.record(rows, target + per_row * rows)
        mode.draft.record(rows, draft + per_row * rows)
    mode.rounds, mode.seconds, mode.tokens = 9, value, 1.0
    return mode


def situation(
    overlapped: bool = False,
    remaining: int = 99,
    acceptance: float = 0.9,
    retry: bool = False,
    burst: int = 1,
    outlook: Outlook | None = None,
    **kwargs: float,
) -> Situation:
    return Situation(overlapped, costs(**kwargs), acceptance, remaining, retry, burst, outlook)


def test_chain_policies_draft_their_length_and_no_further_than_needed() -> None:
    assert Autoregressive().before(chain(), situation()).nodes == []
    assert Speculative(3).before(chain(0.1, 0.1), situation()).nodes == [2]
    assert Speculative(3).before(chain(0.1, 0.1, 0.1), situation()).nodes == []
    assert Speculative(3).before(chain(0.9), situation(remaining=2)).nodes == []
    assert Pearl(4).before(chain(), situation(overlapped=True)).nodes == []
    cut = Pearl(4).cut(chain(0.9, 0.9), situation(overlapped=True))
    assert cut.trunk == (0, 1, 2)
    assert Pearl(4).during(cut, cut.tree, situation(overlapped=True)).nodes == [2]


def test_adaptive_stops_behind_the_first_unsure_token() -> None:
    policy = Adaptive(stop=0.4, max_length=3)
    assert policy.before(chain(0.5), situation()).nodes == [1]
    assert policy.before(chain(0.5, 0.3), situation()).nodes == []
    assert policy.before(chain(0.9, 0.9, 0.9), situation()).nodes == []
    assert policy.cut(chain(0.5, 0.3), situation()).trunk == (0, 1, 2)


def test_a_trunk_never_outruns_the_tokens_that_may_be_committed() -> None:
    tree = chain(0.9, 0.9, 0.9, 0.9)
    for policy in (Speculative(), Pearl(), Ssd(), PaperSpecBranch(), SpecBranch()):
        for remaining in (1, 2, 3):
            for overlapped in (False, True):
                cut = policy.cut(tree, situation(overlapped, remaining))
                assert max(cut.tree.nodes[i].depth for i in cut.trunk) < remaining


def test_specbranch_drafts_while_the_next_token_is_worth_its_step() -> None:
    policy = SpecBranch()
    assert policy.before(chain(), situation()).nodes == [0]
    assert policy.before(chain(0.95), situation()).nodes == [1]  # 0.95 * 0.9 * 0.14 s > 0.1 s
    assert policy.before(chain(0.7), situation()).nodes == []
    assert policy.before(chain(0.7), situation(draft=0.01)).nodes == [1]
    assert policy.before(chain(0.99, 0.99), situation(overlapped=True)).nodes == []  # a hit: the target starts at once
    assert SpecBranch(max_trunk=2).before(chain(0.99, 0.99), situation(draft=0.001)).nodes == []


def test_specbranch_knows_when_not_to_draft_and_looks_again() -> None:
    """A draft that costs more than its tokens are worth rests."""
    policy, tree = SpecBranch(), chain()
    assert policy.before(tree, situation(draft=0.2)).nodes == []
    assert policy.before(tree, situation(draft=0.2, retry=True)).nodes == [0]


def test_a_token_is_worth_no_more_than_a_forward_without_draft() -> None:
    """However slow the rounds were: drafting for 0.2 s a token that a forward of 0.15 s would give does not pay."""
    tree = chain()
    assert SpecBranch().before(tree, situation(target=0.15, draft=0.12, value=9.0)).nodes == [0]
    assert SpecBranch().before(tree, situation(target=0.15, draft=0.2, value=9.0)).nodes == []


def rounds_that_draft(rest: Rest, count: int, stands: Callable[[int], bool]) -> list[int]:
    """Those of `count` rounds in which a draft runs that is only run when its rest is over."""
    found = []
    for i in range(count):
        if drafted := rest.over:
            found.append(i)
        rest.record(drafted, drafted and stands(i))
    return found


def test_a_draft_that_rests_is_tried_ever_less() -> None:
    assert rounds_that_draft(Rest(), 100, lambda i: False) == [8, 25, 58]  # after 8, 16 and 32 rounds without it


def test_a_chance_lasts_while_the_draft_is_right() -> None:
    assert rounds_that_draft(Rest(), 30, lambda i: i < 10) == [8, 9, 10, 27]


def test_a_draft_that_runs_again_by_itself_has_its_failures_forgotten() -> None:
    rest = Rest()
    rounds_that_draft(rest, 60, lambda i: False)
    rest.record(drafted=True, stood=True)
    assert rounds_that_draft(rest, 10, lambda i: False) == [8]


def test_hedging_any_outcome_takes_the_likeliest_first_wherever_they_are() -> None:
    policy = SpecBranch(batch=4)
    now = situation(overlapped=True)
    cut = policy.cut(chain(0.5, 0.9), now)
    growth = policy.during(cut, cut.tree, now)
    reaches = [growth.tree.nodes[node].reach for node in growth.nodes]
    assert reaches == sorted(reaches, reverse=True) == pytest.approx([0.45, 0.05, 0.05, 0.05])
    assert growth.nodes[0] == 2  # the trunk's end
    assert [growth.tree.nodes[node].parent for node in growth.nodes[1:]] == [0, 0, 0]  # beside the unsure token
    assert [growth.tree.nodes[node].token for node in growth.nodes[1:]] == [1, 2, 3]
    sure = policy.cut(chain(0.9, 0.5), now)
    beside = policy.during(sure, sure.tree, now)
    assert {beside.tree.nodes[node].parent for node in beside.nodes[1:]} == {1}


def test_an_outcome_gets_a_row_only_if_it_pays_for_it() -> None:
    tree = chain(0.5, 0.9)
    policy = SpecBranch()
    free, dear = situation(overlapped=True), situation(overlapped=True, per_row=0.02)
    assert len(policy.during(policy.cut(tree, free), tree, free).nodes) == 8
    assert len(policy.during(policy.cut(tree, dear), tree, dear).nodes) == 1  # 0.05 * 0.1 s < 0.02 s
    frugal = SpecBranch(min_reach=0.1)
    assert len(frugal.during(frugal.cut(tree, free), tree, free).nodes) == 1
    assert SpecBranch(min_reach=0.5).during(policy.cut(tree, free), tree, free).nodes == []


@pytest.mark.parametrize(("confidence", "branches"), [(0.65, 2), (0.4, 3), (0.05, 5)])
def test_the_paper_ends_its_trunk_at_the_first_unsure_position_and_branches_there(
    confidence: float, branches: int
) -> None:
    """k = max(1, floor(k_max * (1 - confidence))), the drafted tail being branch 1."""
    policy = PaperSpecBranch(epsilon=0.7, k_max=6)
    tree = chain(0.95, confidence, 0.9)
    now = situation(overlapped=True)
    cut = policy.cut(tree, now)
    assert cut.branch_point == 1
    assert cut.trunk == (0, 1)
    growth = policy.during(cut, cut.tree, now)
    assert len(growth.tree.children(1)) == branches
    assert set(growth.nodes) == {3, *(i for i in growth.tree.children(1) if i != 2)}
    with_tail = PaperSpecBranch(epsilon=0.7, verify_tail=True).cut(tree, now)
    assert with_tail.trunk[:4] == (0, 1, 2, 3)
    assert {with_tail.tree.nodes[node].parent for node in with_tail.trunk[4:]} == {1}


def test_a_sure_trunk_branches_at_its_end() -> None:
    policy = PaperSpecBranch(epsilon=0.5)
    now = situation(overlapped=True)
    cut = policy.cut(chain(0.9, 0.8), now)
    assert cut.branch_point == cut.trunk[-1] == 2
    assert policy.during(cut, cut.tree, now).nodes == [2]
    tree = cut.tree.propose({2: Proposals((1, 2, 3, 4, 5, 6), (0.3, 0.2, 0.1, 0.1, 0.1, 0.1))})
    assert policy.width(tree, 2, cut.branch_point) == 4
    assert policy.width(tree, 1, cut.branch_point) == 1


def test_the_outlook_decides_before_the_confidence_where_the_paper_cuts() -> None:
    tree = chain(0.95, 0.4, 0.9)
    none, some, all_ = Outlook(0.6, 0.3, 0.1), Outlook(0.1, 0.8, 0.1), Outlook(0.1, 0.2, 0.7)
    points = [PaperSpecBranch().cut(tree, situation(True, outlook=word)).branch_point for word in (none, some, all_)]
    assert points == [0, 1, 3]
    assert PaperSpecBranch(decide_by_outlook=False).cut(tree, situation(True, outlook=none)).branch_point == 1


def test_ssd_hedges_a_fixed_number_beside_every_trunk_token() -> None:
    policy = Ssd(fan=2)
    now = situation(overlapped=True, per_row=0.05)
    cut = policy.cut(chain(0.9, 0.1, 0.9), now)
    growth = policy.during(cut, cut.tree, now)
    assert [len(growth.tree.children(node)) for node in (0, 1, 2)] == [3, 3, 3]
    assert len(growth.nodes) == 7  # with the trunk's end


def test_no_hedge_grows_below_the_trunk_only() -> None:
    policy = SpecBranch(hedge="none")
    now = situation(overlapped=True)
    cut = policy.cut(chain(0.5, 0.5), now)
    assert policy.during(cut, cut.tree, now).nodes == [2]


@pytest.mark.parametrize("overlapped", [False, True])
def test_outcomes_beside_the_path_are_verified_where_a_row_pays(overlapped: bool) -> None:
    tree = chain(0.9, 0.4, 0.9)
    free = SpecBranch(beside=5).cut(tree, situation(overlapped))
    assert len(free.trunk) == 4 + 5
    assert free.trunk[:4] == (0, 1, 2, 3)
    others = [free.tree.nodes[node] for node in free.trunk[4:]]
    assert [node.reach for node in others] == sorted((node.reach for node in others), reverse=True)
    assert len(SpecBranch().cut(tree, situation(overlapped, per_row=0.1)).trunk) == 2  # nor is the unsure token


def test_branches_that_survived_are_verified_below_their_parents() -> None:
    """A trunk is a tree: every node of it has its parent in it, whatever lived on from the last round."""
    tree = chain(0.6, 0.9)
    tree = tree.adopt(0, 1)
    side = len(tree) - 1
    tree = tree.propose({side: Proposals((77, 78), (0.9, 0.05))}).branch({side: 1})
    cut = SpecBranch(beside=20).cut(tree, situation(overlapped=True))
    assert {77, 78} <= {cut.tree.nodes[node].token for node in cut.trunk}
    for place, node in enumerate(cut.trunk[1:], start=1):
        assert cut.tree.nodes[node].parent in cut.trunk[:place]


def test_methods_and_options() -> None:
    assert [make_policy(method, {}).name for method in METHODS] == list(METHODS)
    assert make_policy("speculative", {"length": 3, "k_max": 2}) == Speculative(3)
    with pytest.raises(SpecBranchError, match="unknown method 'magic'; expected one of autoregressive"):
        make_policy("magic", {})
    with pytest.raises(SpecBranchError, match="unknown option 'lenght'"):
        make_policy("specbranch", {"lenght": 3})
    with pytest.raises(SpecBranchError, match="epsilon"):
        make_policy("specbranch", {"epsilon": 2.0})
    with pytest.raises(SpecBranchError, match="hedge is 'all'; expected one of any"):
        make_policy("specbranch", {"hedge": "all"})


def test_bursts_go_no_deeper_than_a_policy_would_step_by_step() -> None:
    assert Speculative(5).before(chain(0.9), situation(burst=16)).steps == 4
    assert Speculative(5).before(chain(0.9), situation(burst=3)).steps == 3
    assert Adaptive().before(chain(0.9), situation(burst=16)).steps == 1  # it looks at every token
    tree = chain(0.9, 0.9)
    for policy in (Pearl(limit=8), SpecBranch(limit=8), Ssd(limit=8)):
        now = situation(overlapped=True, burst=16)
        cut = policy.cut(tree, now)
        assert policy.during(cut, cut.tree, now).steps == 6
        late = situation(overlapped=True, burst=16, remaining=5)
        cut = policy.cut(tree, late)
        assert policy.during(cut, cut.tree, late).steps == 2  # four tokens at most are committed behind the root
        last = situation(overlapped=True, burst=16, remaining=3)
        cut = policy.cut(tree, last)
        growth = policy.during(cut, cut.tree, last)
        assert all(growth.tree.nodes[node].depth <= 2 for node in growth.nodes)


def test_a_burst_is_half_of_what_fits_beside_the_target() -> None:
    assert costs(target=0.4, draft=0.05).burst() == 4
    assert costs(target=0.1, draft=0.4).burst() == 1
    assert ModeCosts().burst() == 1
