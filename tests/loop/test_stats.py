"""What was thrown away, cause by cause: on trees made by hand, and on real runs of every method."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import retrieve, tree_of

from specbranch import METHODS, SpecBranch, bundled
from specbranch.core.messages import Step
from specbranch.core.stats import CAUSES, Round, Stats

# root ── 1 ── 2 ── 3 ── 4, with 7 ── 8 beside 2 and 9 beside 4
TREE = tree_of((1, 0, 0.9), (2, 1, 0.8), (3, 2, 0.7), (4, 3, 0.6), (7, 1, 0.1), (8, 5, 0.1), (9, 3, 0.1))
TRUNK = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("path", "next_token", "rejected", "behind", "losing", "left"),
    [
        ((0,), 5, 1, 3, 3, 0),  # the first token is wrong: everything behind it falls
        ((0, 1), 5, 1, 2, 3, 0),
        ((0, 1), 7, 1, 2, 1, 1),  # a sibling saves the round: its child 8 stays, 9 was below the refused trunk
        ((0, 1, 2, 3), 4, 0, 0, 3, 0),  # as the draft thought
        ((0, 1, 2, 3), 9, 1, 0, 2, 0),  # refused just below the trunk, by the token that follows it
        ((0, 1, 2, 3), 5, 1, 0, 3, 0),
    ],
)
def test_causes_on_a_small_tree(path, next_token, rejected, behind, losing, left):
    stats = Stats(drafted=len(TREE) - 1)
    stats.begin_round(0.0, overlapped=False)
    node = TREE.child(path[-1], next_token)
    stats.count(TREE, TRUNK, path, node)
    round = stats.end_round(1.0, tokens=len(path))
    assert (round.rejected, round.behind_rejection, round.losing_branches) == (rejected, behind, losing)
    assert (round.rolled_back, round.wasted) == (rejected + behind, rejected + behind + losing)
    assert {cause: stats.as_dict()[cause] for cause in CAUSES} == {
        "rejected": rejected,
        "behind_rejection": behind,
        "losing_branches": losing,
        "left_over": left,
    }
    assert stats.as_dict()["wasted_tokens"] == round.wasted + left


def test_what_was_retrieved_costs_nothing_until_a_model_runs_over_it():
    """root ── 1 ── 2 ── 3 ── 4, of which 1 was drafted; 3 is verified, and 4 is not."""
    tree = tree_of((1, 0, 0.9))
    run = retrieve(tree, 1, (2, 0.9), (3, 0.9), (4, 0.9))
    trunk = [0, 1, *run[:2]]
    stats = Stats(drafted=1 + tree.use(trunk))
    assert stats.drafted == 3
    stats.begin_round(0.0, overlapped=False)
    stats.count(tree, trunk, [0, 1, run[0]], None)
    assert (stats.verified, stats.accepted, stats.retrieved, stats.retrieved_accepted) == (3, 2, 2, 1)
    assert (stats.rejected, stats.behind_rejection, stats.losing_branches, stats.left_over) == (1, 0, 0, 0)


@pytest.mark.parametrize(("beyond", "accepted", "retrieved"), [(0, 3, 2), (1, 3, 2), (2, 2, 1), (3, 1, 0), (4, 0, 0)])
def test_retrieved_tokens_behind_a_stop_were_not_accepted(beyond, accepted, retrieved):
    tree = tree_of((1, 0, 0.9))
    trunk = [0, 1, *retrieve(tree, 1, (2, 0.9), (3, 0.9))]
    stats = Stats(new_tokens=4, drafted=1 + tree.use(trunk))
    stats.begin_round(0.0, overlapped=False)
    stats.count(tree, trunk, trunk, None)
    stats.end(4 - beyond)
    assert (stats.accepted, stats.retrieved_accepted) == (accepted, retrieved)


def test_an_unfinished_round_leaves_its_drafts_over():
    stats = Stats(drafted=3)
    stats.begin_round(0.0, overlapped=True)
    assert (stats.left_over, stats.as_dict()["wasted_tokens"]) == (3, 3)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.integers(0, 7), new_tokens=st.integers(1, 40), temperature=st.sampled_from((0.0, 1.0)))
def test_every_wasted_token_has_one_cause(
    bundled_pair: SpecBranch, method: str, overlap: bool, prompt: int, new_tokens: int, temperature: float
) -> None:
    """Against the trees of the run itself: what each lost at its verdict, and what was in the last one."""
    lost, standing = [], [0]
    count = Stats.count

    def spy(stats, tree, verified, path, next_node):
        count(stats, tree, verified, path, next_node)
        free = tree.free_nodes()  # retrieved, and no model ran over them: not drafted
        drafted = [node for node in range(len(tree)) if node not in free]
        survivors = [] if next_node is None else [node for node in tree.below(next_node) if node in drafted]
        lost.append(len(drafted) - len(path) - len(survivors))
        standing[0] = max(0, len(survivors) - 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stats, "count", spy)
        stats = bundled_pair.generate(
            bundled.prompts()[prompt]["prompt"],
            max_new_tokens=new_tokens,
            temperature=temperature,
            method=method,
            overlap=overlap,
        ).stats
    row = stats.as_dict()
    assert [round.wasted for round in stats.log] == lost
    beyond = sum(round.tokens for round in stats.log) - stats.new_tokens  # committed behind the end of the text
    left = standing[0] + (beyond - (not stats.log[-1].hit) if beyond else 0)
    assert row["left_over"] == left
    assert sum(row[cause] for cause in CAUSES) == row["wasted_tokens"] == sum(lost) + left
    for cause in CAUSES[:3]:
        assert sum(getattr(round, cause) for round in stats.log) == row[cause]
    assert row["rejected"] <= row["target_forwards"]  # at most one a verdict


def test_tokens_behind_a_stop_are_wasted(bundled_pair: SpecBranch):
    """Every drafted token is in the text or wasted, also where a verdict reaches past the end of the text."""
    prompt, past_the_end = bundled.prompts()[0]["prompt"], 0
    plain = bundled_pair.generate(prompt, max_new_tokens=48)
    for end in range(8, len(plain.text), 5):
        for overlap in (False, True):
            stats = bundled_pair.generate(
                prompt, max_new_tokens=48, stop=plain.text[end : end + 3], method="speculative", overlap=overlap
            ).stats
            past_the_end += sum(round.tokens for round in stats.log) > stats.new_tokens
            assert stats.accepted + stats.hits <= stats.new_tokens
            assert stats.drafted == stats.accepted + stats.hits + stats.wasted
    assert past_the_end > 3


def test_time_outside_the_models():
    steps: dict[str, Any] = dict(draft=[Step(1.0, 2.0, 1), Step(2.5, 4.0, 1)], target=[Step(3.0, 6.0, 4)])
    assert Round(0.0, True, 7.0, **steps).outside_seconds == pytest.approx(1.0 + 0.5 + 1.0)
    assert Round(0.0, True, 7.0).outside_seconds == 7.0
