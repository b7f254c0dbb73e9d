"""The cost model: lines are recovered, and the cheaper mode is taken."""

from itertools import pairwise

import pytest

from specbranch.policies.costs import (
    ENOUGH_ROUNDS,
    RETRY_AFTER,
    RETRY_ROUNDS,
    RETRY_SHARE,
    ROW_PRIOR,
    TRIAL_ROUNDS,
    TRIAL_STAKE,
    Costs,
    ForwardCost,
    ModeCosts,
    Rate,
)


def test_a_line_is_recovered_and_the_first_forward_is_left_out() -> None:
    cost = ForwardCost()
    assert cost.of(3) == 0
    cost.record(1, 99.0)
    for rows in (1, 5, 2, 8, 3):
        cost.record(rows, 0.2 + 0.01 * rows)
    assert cost.per_row == pytest.approx(0.01)
    assert cost.of(6) == pytest.approx(0.26)


def test_what_a_row_costs_is_a_guess_until_sizes_differ() -> None:
    cost = ForwardCost()
    for _ in range(4):
        cost.record(1, 0.1)
    assert cost.per_row == pytest.approx(ROW_PRIOR * 0.1)
    assert cost.of(1) == pytest.approx(0.1)
    for _ in range(4):
        cost.record(9, 0.1)
    assert cost.per_row == pytest.approx(0, abs=1e-9)  # on a GPU, rows are free


def test_one_size_alone_says_what_another_takes_at_most_and_at_least() -> None:
    """All that is known is a forward over 16 rows; those over one row take as long."""
    cost = ForwardCost()
    cost.record(16, 1.0)
    cost.record(16, 1.0)
    assert cost.of(16) == pytest.approx(1.0)
    assert 0.3 < cost.of(1) < 1.0
    cost.record(1, 1.0)
    assert cost.of(1) == pytest.approx(1.0)
    assert cost.per_row == pytest.approx(0, abs=1e-9)


def test_what_was_learned_of_rows_is_kept_while_their_number_stays() -> None:
    cost = ForwardCost()
    for rows in (1, 1, 9):
        cost.record(rows, 1.0)
    for _ in range(2000):
        cost.record(1, 1.0)
    assert cost.of(20) == pytest.approx(1.0)


def bent(rows: int) -> float:
    """Cheap rows while memory is the limit, dear ones beyond."""
    points = ((1, 65.0), (2, 66.0), (4, 68.0), (6, 70.0), (8, 74.0), (16, 95.0))
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(points) if rows <= pair[1][0])
    return (y0 + (y1 - y0) * (rows - x0) / (x1 - x0)) / 1000


@pytest.mark.parametrize("usual", [(3, 4, 5), (6, 7, 8), (9, 12, 16)])
def test_a_forward_over_one_row_is_known_whatever_others_cost(usual: tuple[int, ...]) -> None:
    """A line through the usual rows would say 58 ms for one row where those are many, and so that drafting hardly
    pays."""
    cost = ForwardCost()
    for rows in (1, 1, 1, *usual * 30):
        cost.record(rows, bent(rows))
    assert cost.of(1) == pytest.approx(bent(1))
    for rows in usual:
        assert cost.of(rows) == pytest.approx(bent(rows), rel=0.02)
    assert cost.of(2) >= cost.of(1)


def test_what_one_row_took_is_not_believed_when_more_take_less() -> None:
    """It was measured at a bad moment."""
    cost = ForwardCost()
    for rows in (1, 1, 1):
        cost.record(rows, 0.2)
    for _ in range(100):
        cost.record(4, 0.07)
    assert cost.of(1) <= 0.08


def test_rows_together_take_no_more_than_each_alone() -> None:
    cost = ForwardCost()
    for rows, seconds in ((12, 1.0), (12, 2.2), (11, 1.0), (12, 2.2), (11, 1.0)):
        cost.record(rows, seconds)
    assert cost.of(1) > 0


def test_a_row_must_bring_what_it_costs() -> None:
    mode = ModeCosts()
    assert mode.row_price == ROW_PRIOR
    for rows in (1, 1, 3, 5):
        mode.target.record(rows, 0.1 + 0.02 * (rows - 1))
    mode.drafted = Rate(5, 0.4, 8.0)
    assert mode.row_price == pytest.approx(0.02 / 0.05)
    mode.drafted.tokens = 1.0  # rounds slower than decoding without a draft: a token is worth a forward
    assert mode.row_price == pytest.approx(0.02 / 0.1)


def test_rows_are_dearer_the_more_is_retrieved_and_draft_steps_are_not() -> None:
    """What a drafted token takes is not what those take that were copied before it."""
    mode = ModeCosts()
    for rows in (1, 1, 3, 5):
        mode.target.record(rows, 0.1 + 0.02 * (rows - 1))
        mode.draft.record(1, 0.01)
    for _ in range(2):
        mode.record_round(0.2, 4)
    assert mode.row_price == pytest.approx(0.02 / 0.05)
    for _ in range(200):
        mode.record_round(0.5, 20, drafted=False)
    assert mode.row_price == pytest.approx(0.02 / 0.025, rel=0.01)
    assert mode.drafted_row_price == pytest.approx(0.02 / 0.05)
    assert mode.step_price() == pytest.approx(0.01 / 0.05)
    assert mode.rounds == 2


def test_copied_rounds_count_in_a_trial_of_the_overlapped_mode() -> None:
    """Else a text that is being copied would stay in it for as long."""
    costs = Costs()
    for _ in range(TRIAL_ROUNDS):
        costs.serial.target.record(1, 0.1)
        assert not costs.choose_overlap()
        costs.serial.record_round(0.2, 4)
    for _ in range(TRIAL_ROUNDS):
        assert costs.choose_overlap()
        costs.overlapped.target.record(20, 0.1)
        costs.overlapped.record_round(0.2, 20, drafted=False)
    assert not costs.choose_overlap()  # of drafted tokens it is not known what they take there


def measured(serial: float, overlapped: float) -> Costs:
    """Costs of a pair whose rounds of four tokens took so many seconds."""
    costs = Costs()
    for mode, seconds in ((costs.serial, serial), (costs.overlapped, overlapped)):
        for _ in range(TRIAL_ROUNDS):
            mode.record_round(seconds, 4)
    return costs


def test_each_mode_is_tried_before_one_is_preferred() -> None:
    costs = Costs()
    assert costs.choose_overlap() is False
    for _ in range(TRIAL_ROUNDS):
        costs.serial.record_round(1.0, 3)
    assert costs.choose_overlap() is True


def test_the_cheaper_mode_wins_and_may_lose_again() -> None:
    assert measured(serial=0.4, overlapped=0.3).choose_overlap() is True
    costs = measured(serial=0.4, overlapped=0.6)
    assert costs.choose_overlap() is False
    for _ in range(60):
        costs.serial.record_round(0.9, 4)
    assert costs.choose_overlap() is True


def test_a_mode_that_was_measured_at_a_bad_moment_is_tried_again() -> None:
    costs = measured(serial=0.4, overlapped=0.6)  # truly 0.3
    chosen = []
    for _ in range(400):
        chosen.append(costs.choose_overlap())
        costs.mode(chosen[-1]).record_round(0.3 if chosen[-1] else 0.4, 4)
    assert not any(chosen[:RETRY_AFTER])
    assert all(chosen[-20:])


def test_a_mode_that_is_slower_is_tried_ever_less() -> None:
    costs = measured(serial=0.4, overlapped=0.6)
    chosen = []
    for _ in range(1000):
        chosen.append(costs.choose_overlap())
        costs.mode(chosen[-1]).record_round(0.6 if chosen[-1] else 0.4, 4)
    assert RETRY_ROUNDS < sum(chosen) <= 5 * RETRY_ROUNDS
    first = chosen.index(True)
    # Three rounds that take half as long again: 1 % of the time.
    assert first == pytest.approx(RETRY_ROUNDS * 0.5 / RETRY_SHARE, abs=1)
    assert chosen[first : first + RETRY_ROUNDS + 1] == [True] * RETRY_ROUNDS + [False]


def test_what_was_saved_may_be_put_at_stake_for_the_other_mode() -> None:
    """A text that drafting does not help is not slowed down by a trial either."""
    costs = Costs()
    for _ in range(TRIAL_ROUNDS):
        costs.serial.record_round(0.2, 2)
        costs.serial.target.record(1, 0.1)
    assert costs.choose_overlap(saved=-0.1) is False
    assert costs.choose_overlap(saved=0.99 * TRIAL_STAKE * 0.1) is False
    assert costs.choose_overlap(saved=1.01 * TRIAL_STAKE * 0.1) is True
    costs.drafted = TRIAL_STAKE * 0.1 / RETRY_SHARE  # seconds: by now a trial is a small share of them
    assert costs.choose_overlap(saved=0.0) is True


def test_what_is_not_measured_is_guessed_from_the_sizes() -> None:
    mode = ModeCosts(size=0.25)
    assert mode.step_price() == 0.25
    for _ in range(2):
        mode.target.record(1, 0.1)
    assert mode.step_price() == 0.25
    for _ in range(2):
        mode.draft.record(1, 0.05)
    assert mode.step_price() == pytest.approx(0.5)
    costs = Costs(0.25)
    assert (costs.serial.size, costs.overlapped.size) == (0.25, 0.25)
    costs.target_read.record(100, 2.0)
    assert costs.reading(100) == pytest.approx(0.5)
    assert costs.plain == pytest.approx(0.02)  # at least: a row of the prompt
    costs.draft_read.record(100, 0.8)
    assert costs.reading(100) == pytest.approx(0.8)
    assert costs.reading(50) < 0.8


def test_a_trial_that_goes_badly_ends_early() -> None:
    costs = Costs()
    for _ in range(TRIAL_ROUNDS):
        costs.serial.record_round(0.2, 2)
        costs.serial.target.record(1, 0.1)
    rounds = 0
    while costs.choose_overlap():
        costs.overlapped.record_round(0.3, 2)
        rounds += 1
    assert rounds == 1 + ENOUGH_ROUNDS  # the first one does not count


def test_acceptance_follows_the_verdicts() -> None:
    costs = Costs()
    for _ in range(200):
        costs.record_verdict(1, rejected=True)
    assert costs.acceptance == pytest.approx(0.5, abs=0.01)


def test_a_machine_that_slept_does_not_upset_the_costs() -> None:
    mode = ModeCosts()
    for _ in range(20):
        mode.target.record(2, 0.1)
        mode.record_round(0.2, 2)
    mode.target.record(2, 900.0)
    mode.record_round(900.0, 2)
    assert mode.target.of(2) < 0.15
    assert mode.seconds_per_token < 0.15


def test_prices_of_texts_that_share_their_rounds() -> None:
    """A round's time is divided by the tokens of all, a draft step's by the texts that share it."""
    costs = Costs(0.25)
    costs.at_once(4)
    for rows in (4, 4, 4, 12, 12):
        costs.serial.target.record(rows, 1.0 + 0.01 * rows)
        costs.serial.draft.record(rows, 0.1 + 0.005 * rows)
    assert costs.plain == pytest.approx(1.04 / 4, rel=0.05)
    assert costs.serial.row_price == pytest.approx(0.01 / costs.plain, rel=0.1)
    assert costs.serial.step_price(4) == pytest.approx(0.12 / 4 / costs.plain, rel=0.1)
    assert costs.serial.step_price(1) > 3 * costs.serial.step_price(4)
    costs.serial.record_round(1.0, 4)
    costs.serial.record_round(1.2, 12)
    assert costs.serial.token_value == pytest.approx(0.1)


def test_a_row_of_several_texts_is_no_cheaper_than_one_of_a_prompt() -> None:
    """Rows up to a tile's cost nothing on some processors, and those behind them what they cost in a prompt."""
    costs = Costs(0.25)
    costs.at_once(8)
    assert costs.serial.row_price == pytest.approx(8 * ROW_PRIOR)
    for rows in (1, 1, 8, 8):
        costs.serial.target.record(rows, 0.1)
    assert costs.serial.row_price == 0.0
    for rows in (100, 200):
        costs.record_prompt(rows, 0.06 + 0.004 * rows)
    assert costs.serial.row_price == pytest.approx(0.004 / (0.1 / 8), rel=0.01)
    assert costs.overlapped.least_row == costs.serial.least_row


def test_a_step_that_texts_share_costs_each_its_share_before_anything_is_read() -> None:
    def saving(sharing: int) -> float:
        costs = Costs(0.25)
        for rows in (1, 1, 5, 5):
            costs.serial.target.record(rows, 0.1)
        costs.serial.draft.record(1, 0.09)
        costs.serial.draft.record(8, 0.09)
        return costs.saving(sharing)

    assert saving(1) < 0.02
    assert saving(8) > 0.04


def test_what_is_known_of_fewer_texts_counts_little_for_more() -> None:
    fewer = Costs(0.25)
    for rows in (1, 1, 5, 5):
        fewer.serial.target.record(rows, 1.0)
    fewer.gain.record(10.0, 100)
    more = fewer.for_more()
    more.at_once(8)
    assert more.gain.tokens == 0
    assert more.serial.target.of(8) == pytest.approx(1.0)
    for _ in range(12):
        more.serial.target.record(8, 2.0)
    assert more.serial.target.of(8) == pytest.approx(2.0, rel=0.1)
    assert fewer.serial.target.of(8) == pytest.approx(1.0)
    assert (fewer.texts, more.texts, more.overlapped.texts) == (1, 8, 8)


def test_rows_beyond_all_measured_ones_take_what_a_prompts_rows_take() -> None:
    """Between one row and two there is more noise than slope."""
    costs = Costs(0.25)
    for seconds, rows in ((0.1, 1), (0.1, 1), (0.115, 2)):
        costs.serial.draft.record(rows, seconds)
    assert costs.serial.draft.of(16) == pytest.approx(0.115 + 14 * 0.015, rel=0.1)
    for rows in (100, 200):
        costs.record_prompt(rows, 0.06 + 0.008 * rows)
    assert costs.serial.draft.of(16) == pytest.approx(0.115 + 14 * 0.25 * 0.008, rel=0.1)  # by their sizes
    for rows in (100, 200):
        costs.record_reading(rows, 0.01 + 0.001 * rows)
    assert costs.serial.draft.of(16) == pytest.approx(0.115 + 14 * 0.001, rel=0.1)
    costs.serial.draft.record(16, 0.2)
    assert costs.serial.draft.of(16) == pytest.approx(0.2, rel=0.1)
    assert costs.overlapped.draft.beyond == costs.serial.draft.beyond


def test_texts_together_stake_whole_rounds_on_the_trial_of_the_other_mode() -> None:
    costs = Costs()
    costs.at_once(4)
    for _ in range(TRIAL_ROUNDS):
        costs.serial.record_round(0.8, 4)
        costs.serial.target.record(4, 1.0)
    stake = TRIAL_STAKE * costs.serial.target.of(4)
    assert costs.choose_overlap(saved=0.99 * stake) is False
    assert costs.choose_overlap(saved=1.01 * stake) is True
