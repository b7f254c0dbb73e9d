"""What the draft reads of texts that share rounds: in virtual time, a batch is hardly ever slower for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import pytest
from checked_loop import language
from checked_mix import Shared, WatchedPolicy
from language import LanguageDrafter, LanguageTarget

from specbranch.core.excerpt import ALL
from specbranch.decoding import Decoding
from specbranch.loop import DecodingLoop
from specbranch.policies.costs import RETRY_SHARE, Costs, CostsByTexts
from specbranch.policies.methods import make_policy
from specbranch.policies.reading import LOSSES, AtOnce, Lengths, Reading, Unread, WhenItPays
from specbranch.replay.virtual_time import VirtualTime

NEVER = Lengths(ends=0.0, tokens=1e9)  # texts end


def known(texts: int, draft: float = 0.3, row: float = 0.02) -> Costs:
    """Costs of a pair that was measured with so many texts: a forward of the target takes a second. row: one more row
    of it."""
    costs = Costs(0.3)
    costs.at_once(texts)
    for rows in (1, 1, texts, 4 * texts):
        costs.serial.target.record(rows, 1.0 + row * (rows - 1))
        costs.serial.draft.record(rows, draft)
    costs.draft_read.record(100, 0.1)
    costs.draft_read.record(1000, 1.0)
    costs.accepted, costs.verified = 900.0, 1000.0
    costs.gain.record(0.7 * 1e4, 10_000)
    return costs


def unread(costs: Costs, prompt: int, remaining: int) -> Unread:
    return Unread(costs, {excerpt: prompt - len(excerpt.gap(prompt)) for excerpt in LOSSES}, remaining)


def read(costs: Costs, texts: Sequence[tuple[int, int]], drafting: int = 0, together: bool = False) -> list[bool]:
    """Which of texts of such prompts, and with so many tokens still to come, are read."""
    choices = WhenItPays(NEVER).choose([unread(costs, *text) for text in texts], drafting, together)
    assert len(choices) == len(texts)
    return [choice is not None for choice in choices]


def test_texts_of_many_are_read_where_each_pays() -> None:
    """Each token saves 0.3 of its share of a second."""
    assert read(known(2), [(100, 50), (100, 50)]) == [True, True]
    assert read(known(2), [(380, 1), (100, 50)]) == [False, True]
    assert read(known(2), [(380, 1), (380, 1)]) == [False, False]


def test_texts_that_are_waited_for_together_are_read_all_or_none() -> None:
    assert read(known(2), [(380, 1), (100, 50)], together=True) == [True, True]
    assert read(known(2), [(380, 1), (100, 2)], together=True) == [False, False]
    assert read(known(2), [(380, 1)], together=True) == [False]


def test_a_step_pays_where_enough_texts_share_it() -> None:
    """For one of eight texts alone, the draft's step costs three tokens."""

    def fresh() -> Costs:
        costs = known(8, draft=0.4)
        costs.gain.spent = costs.gain.tokens = 0.0
        return costs

    assert read(fresh(), [(50, 500)]) == [False]
    assert read(fresh(), [(50, 500)] * 8) == [True] * 8
    assert read(fresh(), [(50, 500)], drafting=7) == [True]
    # Without those that do not pay in any company, too few are left.
    assert read(fresh(), [(50, 500)] * 2 + [(50_000, 5)] * 6) == [False] * 8


def test_a_draft_that_does_not_pay_is_tried_with_one_text() -> None:
    costs = known(4)
    costs.gain.spent = 1.1 * costs.gain.tokens
    assert read(costs, [(100, 50)] * 4) == [False] * 4
    costs.idle = 1.6 / RETRY_SHARE
    assert read(costs, [(300, 50), (100, 50), (200, 50), (100, 90)]) == [False, True, False, False]
    assert read(costs, [(100, 50)] * 4, together=True) == [False] * 4
    costs.idle *= 10
    assert read(costs, [(100, 50)] * 4, together=True) == [True] * 4


def test_what_is_guessed_must_promise_twice_what_reading_costs() -> None:
    costs = known(1)
    costs.gain.spent = costs.gain.tokens = 0.0
    saving = costs.saving()
    assert read(costs, [(round(1000 * saving / 1.5), 1)]) == [False]
    assert read(costs, [(round(1000 * saving / 2.1), 1)]) == [True]
    costs.gain.spent, costs.gain.tokens = 1e6 * (1 - saving / costs.plain), 1e6  # the same, and known
    assert read(costs, [(round(1000 * saving / 1.1), 1)]) == [True]


Batch = Sequence[tuple[int, int]]
"""Texts: tokens of the prompt, and of the text."""


def seconds_of(
    seed: int,
    batch: Batch,
    book: CostsByTexts,
    reading: Reading,
    draft: tuple[float, float],
    method: str = "specbranch",
) -> float:
    """Of a batch of texts of a made-up language, all of which begin at once; prompts included."""
    spoken, time, chance = language(seed), VirtualTime(), Random(seed)
    target_cost = (1.0, 0.02)
    shared = Shared(time, target_cost, draft)
    loop = DecodingLoop(time, shared)
    live: list[tuple[Decoding, list[int], list[int]]] = []
    for prompt, count in batch:
        policy = WatchedPolicy(make_policy(method, {}))
        ids = [chance.randrange(8) for _ in range(prompt)]
        target = LanguageTarget(spoken, time, target_cost, prompt + count, 240, read_cost=0.02)
        drafter = None
        if policy.candidates:
            drafter = LanguageDrafter(
                spoken, time, draft, prompt + count, policy.candidates, (240,), 1, 0.02 * draft[0]
            )
            shared.policies[id(drafter)] = policy
        decoding = Decoding(target, drafter, policy, book.of(1), time, None, reading)
        decoding.begin(ids, count)
        live.append((decoding, spoken.text(ids, count), []))
    while live:
        for text, _, _ in live:
            text.costs = book.of(len(live))
        shared.begin_round()
        for turn, (_, _, said) in zip(loop.round([text for text, _, _ in live]), live, strict=True):
            assert turn.error is None
            said += turn.committed
        for _, expected, said in live:
            assert said == expected[: len(said)]
        live = [each for each in live if each[0].remaining]
    return time.now


@pytest.mark.parametrize(
    ("draft", "least", "best"),
    [
        pytest.param((0.1, 0.002), 0.95, {4: 2.0, 8: 1.4, 16: 1.0}, id="quick"),
        pytest.param((0.3, 0.01), 0.96, {4: 1.6, 8: 1.2, 16: 1.0}, id="as its size says"),
        pytest.param((0.9, 0.03), 0.93, {4: 0.96, 8: 1.0, 16: 1.0}, id="three times as slow"),
    ],
)
@pytest.mark.parametrize("texts", [4, 8, 16])
def test_a_batch_is_hardly_slower_than_without_a_draft(
    texts: int, draft: tuple[float, float], least: float, best: Mapping[int, float]
) -> None:
    """The first four batches of an engine, prompts included, whatever the draft is worth; and faster where it is worth
    something. A row of the target costs 2 % of its forward: sixteen texts have none to spare."""
    ratios = []
    for seed in range(12):
        chance, lengths = Random(seed), Lengths()
        batch = [(chance.randint(20, 200), chance.choice((48, 48, 48, 20))) for _ in range(texts)]
        book, plain = CostsByTexts(Costs(0.3)), CostsByTexts(Costs(0.3))
        took = alone = 0.0
        for _ in range(4):
            took += seconds_of(seed, batch, book, WhenItPays(lengths), draft)
            alone += seconds_of(seed, batch, plain, AtOnce(ALL), draft, "autoregressive")
        ratios.append(alone / took)
    assert min(ratios) >= least
    assert max(ratios) >= best[texts]
