"""When the draft reads: what is expected to be saved against what reading costs; in virtual time, hardly ever slower
than without a draft."""

from __future__ import annotations

from random import Random

import pytest
from checked_loop import language
from language import LanguageDrafter, LanguageTarget

from specbranch.core.excerpt import ALL, Excerpt
from specbranch.core.stats import Stats
from specbranch.decoding import Decoding
from specbranch.loop import DecodingLoop
from specbranch.policies.costs import RETRY_SHARE, Costs
from specbranch.policies.gain import Gain, guessed_token_cost
from specbranch.policies.methods import make_policy
from specbranch.policies.reading import LOSSES, AtOnce, Lengths, Reading, Unread, WhenItPays
from specbranch.replay.virtual_time import VirtualTime

ENDS = Excerpt(256, 128)
TARGET, DRAFT = (1.0, 0.02), (0.3, 0.01)  # seconds of a forward, and of each row


def known(target: float = 1.0, draft: float = 0.3, read: float = 0.01, acceptance: float = 0.9) -> Costs:
    """Costs of a pair that was measured; read: the draft's seconds a row of a prompt."""
    costs = Costs(0.3)
    for rows in (1, 1, 1, 5):
        costs.serial.target.record(rows, target)
        costs.serial.draft.record(rows, draft)
    for tokens in (100, 1000):
        costs.target_read.record(tokens, 3 * read * tokens)
        costs.draft_read.record(tokens, read * tokens)
    costs.accepted, costs.verified = 1000 * acceptance, 1000.0
    return costs


def unread(costs: Costs, prompt: int, remaining: int) -> Unread:
    return Unread(costs, {excerpt: prompt - len(excerpt.gap(prompt)) for excerpt in LOSSES}, remaining)


def choose(costs: Costs, prompt: int, remaining: int, lengths: Lengths | None = None) -> Excerpt | None:
    (chosen,) = WhenItPays(lengths or Lengths()).choose([unread(costs, prompt, remaining)])
    return chosen


def test_texts_that_were_cut_off_did_not_end() -> None:
    short, cut = Lengths(), Lengths()
    for _ in range(40):
        short.record(20, ended=True)
        cut.record(20, ended=False)
    assert short.expected(500) == pytest.approx(20, rel=0.2)
    assert cut.expected(500) > 400
    assert cut.expected(7) == pytest.approx(7, rel=0.05)
    assert 0 < Lengths().expected(1) <= 1
    never = Lengths(ends=0.0, tokens=0.0)
    assert never.expected(100) == pytest.approx(100, rel=1e-3)


def test_a_guess_follows_from_acceptance_and_costs() -> None:
    assert guessed_token_cost(0.8, 0.3, 0.0) < guessed_token_cost(0.5, 0.3, 0.0) < 1
    assert guessed_token_cost(0.1, 0.5, 0.0) == 1.0  # nothing drafted is best
    assert guessed_token_cost(0.9, 1.0, 0.1) == 1.0
    gain = Gain()
    assert gain.token_cost(0.6) == 0.6
    for _ in range(300):
        gain.record(2.2, 2)
    assert gain.token_cost(0.6) == pytest.approx(1.1, abs=0.1)
    gain.fade()
    assert gain.token_cost(0.6) < 1.03


def test_a_short_answer_does_not_pay_for_a_long_prompt() -> None:
    assert choose(known(), 2000, 200) is not None
    assert choose(known(), 2000, 5) is None
    assert choose(known(), 10, 5) is not None
    brief = Lengths()
    for _ in range(30):
        brief.record(5, ended=True)
    assert choose(known(), 2000, 200, brief) is None
    assert choose(known(read=0.001), 2000, 200, brief) is not None


def test_the_middle_is_read_where_that_is_cheap() -> None:
    assert choose(known(read=0.02), 2000, 200) == ENDS
    assert choose(known(read=0.0001), 2000, 200) == ALL
    assert choose(known(), 300, 200) == ALL  # there is no middle
    assert choose(known(read=0.004), 2000, 200, Lengths(0.0, 1e6)) == Excerpt(512, 256)


def test_nothing_is_read_for_a_draft_that_is_no_faster() -> None:
    assert choose(known(draft=1.2), 500, 500) is None
    lost = known()
    for _ in range(300):
        lost.record_drafted(2.3, 2)
    assert choose(lost, 500, 500) is None
    lost.idle = 1e5  # and tried again at last
    assert choose(lost, 500, 500) is not None
    lost.record_reading(384, 3.8)
    lost.end_waiting()
    assert lost.idle == 0
    assert choose(lost, 500, 500) is not None or lost.gain.tokens < 100


def test_before_anything_is_measured_sizes_and_the_prompt_say_something() -> None:
    """A token takes at least what a row of the prompt took: enough for a short prompt, else two rounds tell more."""
    costs = Costs(0.3)
    costs.target_read.record(1000, 6.0)
    assert choose(costs, 1000, 100) is None
    for _ in range(2):
        costs.serial.target.record(1, 0.15)
    assert choose(costs, 1000, 100) == ENDS
    short = Costs(0.3)
    short.target_read.record(20, 0.2)
    assert choose(short, 20, 100) == ALL
    assert choose(Costs(), 20, 100) == ALL  # no times at all: in a replay nothing costs anything


def decode(
    seed: int, prompt: int, count: int, costs: Costs, reading: Reading, read: float = 0.0125, method: str = "specbranch"
) -> Stats:
    """A text of the made-up language. read: the draft's seconds a row of a prompt; the target's are three times it."""
    spoken, time, policy = language(seed), VirtualTime(), make_policy(method, {})
    chance = Random(seed)
    text = [chance.randrange(8) for _ in range(prompt)]
    target = LanguageTarget(spoken, time, TARGET, prompt + count, 240, read_cost=3 * read)
    draft = None
    if policy.candidates:
        draft = LanguageDrafter(spoken, time, DRAFT, prompt + count, policy.candidates, (240,), 1, read)
    decoding = Decoding(target, draft, policy, costs, time, None, reading)
    rounds = DecodingLoop(time).rounds(decoding, text, count)
    assert [token for committed in rounds for token in committed] == spoken.text(text, count)
    decoding.stats.seconds = time.now
    return decoding.stats


@pytest.mark.parametrize(
    ("prompt", "count", "least", "best"),
    [(600, 6, 0.97, 1.0), (600, 48, 0.96, 1.3), (60, 48, 0.95, 1.8), (600, 120, 0.97, 1.5), (2000, 12, 0.97, 1.0)],
)
def test_an_engine_is_hardly_slower_than_without_a_draft(prompt: int, count: int, least: float, best: float) -> None:
    """The first eight texts of an engine, prefill included, whatever the draft is worth (here it is never told how
    wrong it is); and faster where it is worth something."""
    ratios = []
    for seed in range(20):
        costs, lengths = Costs(0.3), Lengths()
        took = alone = 0.0
        for _ in range(8):
            took += decode(seed, prompt, count, costs, WhenItPays(lengths)).seconds
            alone += decode(seed, prompt, count, Costs(), AtOnce(ALL), method="autoregressive").seconds
            lengths.record(count, ended=True)
        ratios.append(alone / took)
    assert min(ratios) >= least
    assert max(ratios) >= best


def test_a_text_that_is_not_read_is_decoded_without_a_draft() -> None:
    costs = Costs(0.3)
    stats = decode(1, 2000, 6, costs, WhenItPays(Lengths()))
    plain = decode(1, 2000, 6, Costs(), AtOnce(ALL), method="autoregressive")
    assert (stats.draft_context_tokens, stats.draft_forwards, stats.drafted) == (0, 0, 0)
    assert stats.seconds == pytest.approx(plain.seconds)
    assert costs.idle == pytest.approx(6 * sum(TARGET))
    assert stats.saved_seconds == 0.0


def test_what_a_text_has_saved_is_counted_prefill_included() -> None:
    for seed in range(12):
        costs = Costs(0.3)
        for number in range(3):
            stats = decode(seed, 400, 60, costs, AtOnce(ENDS))
            alone = decode(seed, 400, 60, Costs(), AtOnce(ALL), method="autoregressive").seconds
            if number:
                assert stats.saved_seconds == pytest.approx(alone - stats.seconds, abs=0.06 * alone), seed
                assert stats.draft_context_tokens == 384
                assert stats.draft_prefill_seconds == pytest.approx(0.0125 * 383)
                assert stats.prefill_seconds == pytest.approx(0.0375 * 399 + 0.0125 * 383)


def test_trials_of_a_draft_that_loses_are_a_small_share_of_the_time() -> None:
    costs, lost = known(read=0.05), 0.0
    reading, passed = WhenItPays(Lengths()), 0.0
    for _ in range(3000):
        if reading.choose([unread(costs, 600, 60)]) == [None]:
            costs.idle += 60.0
            passed += 60.0
            continue
        price = costs.reading(384)
        costs.record_reading(384, price)
        costs.end_waiting()
        for _ in range(60):
            costs.record_drafted(1.05, 1)
        lost += price + 3.0
    assert passed > 0
    assert lost <= 2.5 * RETRY_SHARE * passed + 100
