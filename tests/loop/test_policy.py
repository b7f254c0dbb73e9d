"""Policies as pure functions: what they verify, where they branch, when they stop drafting."""

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from trees import retrieve, tree_of

from specbranch import METHODS, SpecBranchError
from specbranch.core.messages import Forecast
from specbranch.core.stats import Round, Stats
from specbranch.core.tree import Choice, Proposals, Tree
from specbranch.loop import Turn, _copied
from specbranch.policies.backoff import RETRY_SHARE, Backoff
from specbranch.policies.branching import FIRST_STEP, Hedging, Paper, Ssd
from specbranch.policies.chain import Adaptive, Autoregressive, Pearl, Speculative
from specbranch.policies.costs import LOSS_SHARE, LOSS_START, Costs, ModeCosts, Rate
from specbranch.policies.methods import make_policy, options_of
from specbranch.policies.policy import Expansion, InFlight, Policy, State, TrunkChoice

CANDIDATES = 6


def proposals(depth: int, chance: float) -> Proposals:
    """Candidates 10 * depth, 10 * depth + 1, …: the first with this chance, the others sharing half the rest."""
    rest = [(1 - chance) / 2 / (CANDIDATES - 1)] * (CANDIDATES - 1)
    return Proposals(tuple(range(depth * 10, depth * 10 + CANDIDATES)), (chance, *rest))


def chain(*chances: float) -> Tree:
    """A drafted chain with these chances; every node but the last has proposals."""
    tree = Tree(0, 10)
    for depth, chance in enumerate(chances):
        tree.note(depth, proposals(depth, chance))
        tree.branch(depth, 1)
    return tree


def nodes(expansion: Expansion) -> list[int]:
    """The nodes of an expansion that makes none."""
    assert all(choice.rank < 0 for choice in expansion.choices)
    return [choice.node for choice in expansion.choices]


def grow(tree: Tree, expansion: Expansion) -> list[int]:
    """The nodes of an expansion, those that it makes among them."""
    return [tree.take(choice) for choice in expansion.choices]


def verify(tree: Tree, choice: TrunkChoice) -> InFlight:
    """What the loop makes of a choice."""
    taken = tuple(tree.take(each) for each in choice.choices)
    return InFlight(taken, taken[choice.branch_point])


def costs(target: float = 0.23, draft: float = 0.1, per_row: float = 0.0, value: float = 0.14) -> ModeCosts:
    """value: seconds that a committed token is worth."""
    mode = ModeCosts()
    for rows in (1, 1, 2, 5):
        mode.target.record(rows, target + per_row * rows)
        mode.draft.record(rows, draft + per_row * rows)
    mode.drafted = Rate(9, value, 1.0)
    return mode


def state_of(
    overlapped: bool = False,
    remaining: int = 99,
    acceptance: float = 0.9,
    retry: bool = False,
    burst: int = 1,
    forecast: Forecast | None = None,
    **kwargs: float,
) -> State:
    return State(overlapped, costs(**kwargs), acceptance, remaining, retry, burst, forecast)


def test_chain_policies_draft_their_length_and_no_further_than_needed() -> None:
    assert Autoregressive().draft_before(chain(), state_of()).choices == []
    assert nodes(Speculative(3).draft_before(chain(0.1, 0.1), state_of())) == [2]
    assert Speculative(3).draft_before(chain(0.1, 0.1, 0.1), state_of()).choices == []
    assert Speculative(3).draft_before(chain(0.9), state_of(remaining=2)).choices == []
    assert Pearl(4).draft_before(chain(), state_of(overlapped=True)).choices == []
    tree = chain(0.9, 0.9)
    flight = verify(tree, Pearl(4).choose_trunk(tree, state_of(overlapped=True)))
    assert flight.nodes == (0, 1, 2)
    assert nodes(Pearl(4).draft_during(tree, flight, state_of(overlapped=True))) == [2]


def test_adaptive_stops_behind_the_first_unsure_token() -> None:
    policy = Adaptive(stop_below=0.4, max_length=3)
    assert nodes(policy.draft_before(chain(0.5), state_of())) == [1]
    assert policy.draft_before(chain(0.5, 0.3), state_of()).choices == []
    assert policy.draft_before(chain(0.9, 0.9, 0.9), state_of()).choices == []
    tree = chain(0.5, 0.3)
    assert verify(tree, policy.choose_trunk(tree, state_of())).nodes == (0, 1, 2)


def test_a_trunk_never_outruns_the_tokens_that_may_be_committed() -> None:
    tree = chain(0.9, 0.9, 0.9, 0.9)
    for policy in (Speculative(), Pearl(), Ssd(), Paper(), Hedging()):
        for remaining in (1, 2, 3):
            for overlapped in (False, True):
                choice = policy.choose_trunk(tree, state_of(overlapped, remaining))
                assert max(tree.depth[each.node] + (each.rank >= 0) for each in choice.choices) < remaining


def test_specbranch_drafts_while_the_next_token_is_worth_its_step() -> None:
    policy = Hedging()
    assert nodes(policy.draft_before(chain(), state_of())) == [0]
    assert nodes(policy.draft_before(chain(0.95), state_of())) == [1]  # 0.95 * 0.9 * 0.14 s > 0.1 s
    assert policy.draft_before(chain(0.7), state_of()).choices == []
    assert nodes(policy.draft_before(chain(0.7), state_of(draft=0.01))) == [1]
    assert (
        policy.draft_before(chain(0.99, 0.99), state_of(overlapped=True)).choices == []
    )  # a hit: the target starts at once
    assert Hedging(max_trunk=2).draft_before(chain(0.99, 0.99), state_of(draft=0.001)).choices == []


def test_specbranch_knows_when_not_to_draft_and_looks_again() -> None:
    """A draft that costs more than its tokens are worth rests."""
    policy, tree = Hedging(), chain()
    assert policy.draft_before(tree, state_of(draft=0.2)).choices == []
    assert nodes(policy.draft_before(tree, state_of(draft=0.2, retry=True))) == [0]


def test_a_draft_that_has_cost_a_text_too_much_rests() -> None:
    """However sure it is; until it is time to look again."""
    policy, tree = Hedging(), chain()
    assert nodes(policy.draft_before(tree, state_of())) == [0]
    assert policy.draft_before(tree, replace(state_of(), losing=True)).choices == []
    assert nodes(policy.draft_before(tree, replace(state_of(retry=True), losing=True))) == [0]
    costs = Costs()
    for _ in range(2):
        costs.serial.target.record(1, 0.1)
    assert costs.bearable_loss(0) == pytest.approx(0.1 * LOSS_START)
    assert costs.bearable_loss(100) == pytest.approx(0.1 * (LOSS_START + 100 * LOSS_SHARE))


def test_a_token_is_worth_no_more_than_a_forward_without_draft() -> None:
    """However slow the rounds were: drafting for 0.2 s a token that a forward of 0.15 s would give does not pay."""
    tree = chain()
    assert nodes(Hedging().draft_before(tree, state_of(target=0.15, draft=0.12, value=9.0))) == [0]
    assert Hedging().draft_before(tree, state_of(target=0.15, draft=0.2, value=9.0)).choices == []


def rounds_that_draft(backoff: Backoff, count: int, gain: Callable[[int], float], price: float = 0.1) -> list[int]:
    """Those of `count` rounds in which a draft runs that only runs in trials. gain: of a trial's round."""
    found = []
    for i in range(count):
        if drafted := backoff.over(price):
            found.append(i)
        backoff.record(drafted, gain(i) if drafted else 0.0, trial=drafted)
    return found


def test_a_draft_that_does_not_pay_is_tried_ever_less() -> None:
    assert rounds_that_draft(Backoff(), 100, lambda i: -0.1) == [8, 25, 58]  # after 8, 16 and 32 idle rounds


def test_trials_of_a_dear_draft_cost_a_small_share_of_the_time() -> None:
    """By what a step costs, and once a trial has failed by what it lost, catching up with the text included."""
    assert rounds_that_draft(Backoff(), 100, lambda i: -1.0, price=0.8)[0] == 0.8 / RETRY_SHARE
    for lost in (0.3, 1.0, 3.0):
        found = rounds_that_draft(Backoff(), 5000, lambda i, lost=lost: -lost, price=0.2)  # type: ignore[misc]
        assert found[0] == 0.2 / RETRY_SHARE
        assert len(found[1:]) * lost <= RETRY_SHARE * 5000


def test_a_trial_lasts_while_it_pays() -> None:
    assert rounds_that_draft(Backoff(), 30, lambda i: 0.5 if i < 10 else -0.1) == [8, 9, 10, 27]


def test_a_draft_that_runs_again_by_itself_has_its_failures_forgotten() -> None:
    backoff = Backoff()
    rounds_that_draft(backoff, 60, lambda i: -0.1)
    backoff.record(drafted=True, gain=0.3, trial=False)
    assert rounds_that_draft(backoff, 10, lambda i: -0.1) == [8]


NOW = state_of(overlapped=True)


def test_hedging_any_outcome_takes_the_likeliest_first_wherever_they_are() -> None:
    policy, tree = Hedging(batch=4), chain(0.5, 0.9)
    flight = verify(tree, policy.choose_trunk(tree, NOW))
    grown = grow(tree, policy.draft_during(tree, flight, NOW))
    reaches = [tree.reach[node] for node in grown]
    assert reaches == sorted(reaches, reverse=True) == pytest.approx([0.45, 0.05, 0.05, 0.05])
    assert grown[0] == 2  # the trunk's end
    assert [tree.parent[node] for node in grown[1:]] == [0, 0, 0]  # beside the unsure token
    assert tree.tokens(grown[1:]) == [1, 2, 3]
    sure = chain(0.9, 0.5)
    flight = verify(sure, policy.choose_trunk(sure, NOW))
    grown = grow(sure, policy.draft_during(sure, flight, NOW))
    assert {sure.parent[node] for node in grown[1:]} == {1}


def test_an_outcome_gets_a_row_only_if_it_pays_for_it() -> None:
    def rows(policy: Hedging, state: State) -> int:
        tree = chain(0.5, 0.9)
        flight = verify(tree, policy.choose_trunk(tree, state))
        return len(policy.draft_during(tree, flight, state).choices)

    assert rows(Hedging(), NOW) == 8
    assert rows(Hedging(), state_of(overlapped=True, per_row=0.02)) == 1  # 0.05 * 0.1 s < 0.02 s
    assert rows(Hedging(min_reach=0.1), NOW) == 1
    assert rows(Hedging(min_reach=0.5), NOW) == 0


@pytest.mark.parametrize(("confidence", "branches"), [(0.65, 2), (0.4, 3), (0.05, 5)])
def test_the_paper_ends_its_trunk_at_the_first_unsure_position_and_branches_there(
    confidence: float, branches: int
) -> None:
    """k = max(1, floor(k_max * (1 - confidence))), the drafted tail being branch 1."""
    policy, tree = Paper(epsilon=0.7, k_max=6), chain(0.95, confidence, 0.9)
    flight = verify(tree, policy.choose_trunk(tree, NOW))
    assert flight == InFlight((0, 1), branch_point=1)
    grown = grow(tree, policy.draft_during(tree, flight, NOW))
    assert len(tree.children[1]) == branches
    assert set(grown) == {3, *(child for child in tree.children[1] if child != 2)}
    tree = chain(0.95, confidence, 0.9)
    with_tail = verify(tree, Paper(epsilon=0.7, verify_tail=True).choose_trunk(tree, NOW))
    assert with_tail.nodes[:4] == (0, 1, 2, 3)
    assert {tree.parent[node] for node in with_tail.nodes[4:]} == {1}


def test_a_sure_trunk_branches_at_its_end() -> None:
    policy, tree = Paper(epsilon=0.5), chain(0.9, 0.8)
    flight = verify(tree, policy.choose_trunk(tree, NOW))
    assert flight == InFlight((0, 1, 2), branch_point=2)
    assert nodes(policy.draft_during(tree, flight, NOW)) == [2]
    tree.note(2, Proposals((1, 2, 3, 4, 5, 6), (0.3, 0.2, 0.1, 0.1, 0.1, 0.1)))
    assert policy.width(tree, 2, flight) == 4
    assert policy.width(tree, 1, flight) == 1
    assert policy.width(tree, 2, None) == 1


def test_the_forecast_decides_before_the_confidence_where_the_paper_cuts() -> None:
    tree = chain(0.95, 0.4, 0.9)
    none, some, all_ = Forecast(0.6, 0.3, 0.1), Forecast(0.1, 0.8, 0.1), Forecast(0.1, 0.2, 0.7)
    points = [Paper().choose_trunk(tree, state_of(True, forecast=each)).branch_point for each in (none, some, all_)]
    assert points == [0, 1, 3]
    assert Paper(decide_by_forecast=False).choose_trunk(tree, state_of(True, forecast=none)).branch_point == 1


def test_ssd_hedges_a_fixed_number_beside_every_trunk_token() -> None:
    policy, tree = Ssd(fan=2), chain(0.9, 0.1, 0.9)
    now = state_of(overlapped=True, per_row=0.05)
    flight = verify(tree, policy.choose_trunk(tree, now))
    grown = grow(tree, policy.draft_during(tree, flight, now))
    assert [len(tree.children[node]) for node in (0, 1, 2)] == [3, 3, 3]
    assert len(grown) == 7  # with the trunk's end


def test_no_hedge_grows_below_the_trunk_only() -> None:
    policy, tree = Hedging(hedge="none"), chain(0.5, 0.5)
    flight = verify(tree, policy.choose_trunk(tree, NOW))
    assert nodes(policy.draft_during(tree, flight, NOW)) == [2]


@pytest.mark.parametrize("overlapped", [False, True])
def test_outcomes_beside_the_path_are_verified_where_a_row_pays(overlapped: bool) -> None:
    tree = chain(0.9, 0.4, 0.9)
    dear = Hedging().choose_trunk(tree, state_of(overlapped, per_row=0.1))
    assert len(dear.choices) == 2  # nor is the unsure token
    free = verify(tree, Hedging(siblings=5).choose_trunk(tree, state_of(overlapped)))
    assert len(free.nodes) == 4 + 5
    assert free.nodes[:4] == (0, 1, 2, 3)
    others = [tree.reach[node] for node in free.nodes[4:]]
    assert others == sorted(others, reverse=True)


def test_branches_that_survived_are_verified_below_their_parents() -> None:
    """A trunk is a tree: every node of it has its parent in it, whatever lived on from the last round."""
    tree = chain(0.6, 0.9)
    side = tree.take(Choice(0, 1))
    tree.note(side, Proposals((77, 78), (0.9, 0.05)))
    tree.branch(side, 1)
    flight = verify(tree, Hedging(siblings=20).choose_trunk(tree, NOW))
    assert {77, 78} <= set(tree.tokens(flight.nodes))
    for place, node in enumerate(flight.nodes[1:], start=1):
        assert tree.parent[node] in flight.nodes[:place]


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
    refused: list[tuple[dict[str, object], str]] = [
        ({"epsilon": 2.0}, "epsilon is 2.0; expected 0 <= epsilon <= 1"),
        ({"k_max": 0}, "k_max is 0; expected 1 <= k_max"),
        ({"k_max": 2.5}, "k_max is 2.5; expected an integer"),
        ({"k_max": True}, "k_max is True; expected an integer"),
        ({"min_reach": float("nan")}, "min_reach is nan; expected 0 <= min_reach <= 1"),
        ({"thrifty": 1}, "thrifty is 1; expected True or False"),
        ({"epsilon": "0.5"}, "epsilon is '0.5'; expected a number"),
    ]
    for options, message in refused:
        with pytest.raises(SpecBranchError, match=re.escape(message)):
            make_policy("specbranch", options)
    assert make_policy("specbranch", {"epsilon": 1}) == Hedging(epsilon=1)
    from_yaml = make_policy("specbranch", {"k_max": 2.0})
    assert from_yaml == Hedging(k_max=2)
    assert isinstance(from_yaml, Hedging)
    assert type(from_yaml.k_max) is int
    others: list[Any] = [[], {}, None, 3]
    for method in others:
        with pytest.raises(SpecBranchError, match="unknown method"):
            make_policy(method, {})


def test_every_option_says_what_it_is_for() -> None:
    for method in METHODS:
        for name, declared in options_of(method).items():
            assert declared.metadata["help"], (method, name)


def test_bursts_go_no_deeper_than_a_policy_would_step_by_step() -> None:
    assert Speculative(5).draft_before(chain(0.9), state_of(burst=16)).steps == 4
    assert Speculative(5).draft_before(chain(0.9), state_of(burst=3)).steps == 3
    assert Adaptive().draft_before(chain(0.9), state_of(burst=16)).steps == 1  # it looks at every token

    def during(policy: Policy, state: State) -> tuple[Tree, Expansion]:
        tree = chain(0.9, 0.9)
        return tree, policy.draft_during(tree, verify(tree, policy.choose_trunk(tree, state)), state)

    for policy in (make_policy(method, {"max_depth": 8}) for method in ("pearl", "specbranch", "ssd")):
        assert during(policy, state_of(overlapped=True, burst=16))[1].steps == 6
        late = state_of(overlapped=True, burst=16, remaining=5)
        assert during(policy, late)[1].steps == 2  # four tokens at most are committed behind the root
        tree, expansion = during(policy, state_of(overlapped=True, burst=16, remaining=3))
        assert all(tree.depth[node] <= 2 for node in grow(tree, expansion))


def test_a_burst_is_half_of_what_fits_beside_the_target() -> None:
    assert costs(target=0.4, draft=0.05).burst() == 4
    assert costs(target=0.1, draft=0.4).burst() == 1
    assert ModeCosts().burst() == 1


def test_a_root_that_was_drafted_meanwhile_is_not_drafted_again() -> None:
    """After a hit the new root may have proposals and no children: they are a trunk that can be verified at once."""
    tree = Tree(0, 10)
    tree.note(0, proposals(0, 0.9))
    assert Hedging().draft_before(tree, NOW).choices == []
    assert Hedging().choose_trunk(tree, NOW).choices[:2] == [Choice(0), Choice(0, 0)]
    assert Hedging().draft_before(tree, state_of()).choices == [Choice(0, 0)]  # in turn, the draft goes on behind them


# ---- Retrieved tokens


def test_a_step_over_retrieved_tokens_is_worth_what_may_go_wrong_in_them() -> None:
    """A token, if the draft is right, where the first of them is reached and the last one does not bring the next; and
    of the target's rows those that are planned behind a wrong one, which then has one itself."""
    tree = tree_of()
    run = retrieve(tree, 0, (1, 0.99), (2, 0.2), (3, 0.99))
    places = [Choice(0), *map(Choice, run)]
    for per_row in (0.0, 0.001, 0.004, 0.02, 0.1):
        for draft in (0.001, 0.05, 0.1, 0.3):
            for acceptance in (0.3, 0.9):
                state = state_of(acceptance=acceptance, draft=draft, per_row=per_row)
                reaches = [*tree.reaches(places), 0.0]
                row_price = state.costs.row_price
                planned = [place for place, reach in enumerate(reaches) if reach >= row_price]
                wrong = [reaches[place] - reaches[place + 1] for place in range(3)]
                more_rows = [wrong[place] * (1 - sum(other > place for other in planned)) for place in range(3)]
                for first, more in ((False, 1.0), (True, FIRST_STEP)):
                    profits = {
                        count: acceptance * (1.0 - reaches[count]) * more
                        - state.step_price(count)
                        - row_price * ((count == 4) + acceptance * sum(more_rows[:count]))
                        for count in range(1, 5)
                    }
                    count = Hedging()._worth_a_step(tree.reaches(places), 99, first, state)
                    if count:
                        assert profits[count] == pytest.approx(max(profits.values()))
                        assert profits[count] >= -1e-12
                    else:
                        assert max(profits.values()) < 1e-12
    cheap, dear = state_of(draft=0.02), state_of(draft=0.02, per_row=0.03)
    assert nodes(Hedging().draft_before(tree, cheap)) == [0, *run]  # and the token behind them
    assert nodes(Hedging().draft_before(tree, dear)) == [0, run[0]]  # where the second one is likely to be wrong


def test_a_draft_does_not_run_over_a_sure_copy_before_the_target_is_asked() -> None:
    """What it would bring behind one token costs a row at each of them."""
    tree = tree_of()
    run = retrieve(tree, 0, *((token, 0.999) for token in range(1, 9)))
    assert Hedging().draft_before(tree, state_of(draft=0.05, per_row=0.03)).choices == []
    assert nodes(Hedging().draft_before(tree, state_of(draft=0.05))) == [0, *run]
    assert [choice.node for choice in Hedging().choose_trunk(tree, state_of()).choices] == [0, *run]


@pytest.mark.parametrize(("chance", "drafted"), [(0.999, False), (0.5, True)])
def test_beside_the_target_the_draft_passes_over_nodes_whose_next_token_is_nearly_sure(
    chance: float, drafted: bool
) -> None:
    """The row of such a one would be in vain; and so are those below it."""
    tree = chain(0.9)
    run = retrieve(tree, 1, (91, chance), (92, chance))
    policy, state = Hedging(), state_of(overlapped=True, per_row=0.01)
    wanted = policy.draft_during(tree, verify(tree, policy.choose_trunk(tree, state)), state)
    places = [choice.node for choice in wanted.choices if choice.rank < 0]
    assert (1 in places) == drafted
    assert (run[0] in places) == drafted
    assert drafted or not {*run} & {*places}


def test_a_node_is_drafted_where_what_is_above_it_is_read_or_drafted_in_the_same_step() -> None:
    tree = chain(0.9)
    run = retrieve(tree, 1, (91, 0.5))
    policy = Hedging()
    assert policy._worth_a_row(tree, Choice(1), [], 0.1)
    assert policy._worth_a_row(tree, Choice(0, 1), [], 0.1)
    assert not policy._worth_a_row(tree, Choice(run[0]), [], 0.1)
    assert policy._worth_a_row(tree, Choice(run[0]), [Choice(1)], 0.1)
    tree.note(1, proposals(1, 0.5))
    assert policy._worth_a_row(tree, Choice(run[0]), [], 0.1)


@pytest.mark.parametrize(
    ("rounds", "copied"),
    [
        ([(4, 2)], False),
        ([(4, 3)], True),
        ([(1, 0)], False),
        ([(4, 3), (4, 0)], False),
        ([(9, 8), (4, 0)], True),
    ],
)
def test_a_round_is_copied_when_most_tokens_of_all_its_texts_are(rounds: list[tuple[int, int]], copied: bool) -> None:
    """(tokens, retrieved ones that were accepted) of each text; only its newest round counts."""
    before = Round(0.0, False, tokens=9, retrieved_accepted=8 * (not copied))
    logs = [[before, Round(0.0, False, tokens=tokens, retrieved_accepted=found)] for tokens, found in rounds]
    turns = [SimpleNamespace(text=SimpleNamespace(stats=Stats(log=log))) for log in logs]
    assert _copied(cast(list[Turn], turns)) == copied
