"""The cost model: lines are recovered, and the cheaper mode is taken."""

import pytest

from specbranch.costs import RETRY_AFTER, RETRY_ROUNDS, TRIAL_ROUNDS, Costs, ForwardCost, ModeCosts


def test_a_line_is_recovered_and_the_first_forward_is_left_out() -> None:
    cost = ForwardCost()
    assert cost.of(3) == 0
    cost.record(1, 99.0)
    for rows in (1, 5, 2, 8, 3):
        cost.record(rows, 0.2 + 0.01 * rows)
    assert cost.per_row == pytest.approx(0.01)
    assert cost.of(6) == pytest.approx(0.26)


def test_one_row_count_gives_a_flat_line() -> None:
    cost = ForwardCost()
    for _ in range(4):
        cost.record(1, 0.1)
    assert cost.per_row == 0
    assert cost.of(4) == pytest.approx(0.1)


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
    costs = measured(serial=0.4, overlapped=1.2)  # truly 0.3
    chosen = []
    for _ in range(200):
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
    assert first == RETRY_AFTER
    assert chosen[first : first + RETRY_ROUNDS + 1] == [True] * RETRY_ROUNDS + [False]


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
