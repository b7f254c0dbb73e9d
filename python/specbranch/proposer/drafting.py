"""Drafts for all texts of a step: before the engine verifies, and while it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from specbranch.policies.policy import Expansion, Policy, State
from specbranch.proposer.text import Text
from specbranch.stages import ShouldContinue

Guard = Callable[[Text, Callable[[], None]], None]
"""Does some work for a text; a fault in it ends the drafting of that text, and nothing else."""


@dataclass(frozen=True, eq=False)
class Turn:
    """A text, and what a policy may look at besides its tree."""

    text: Text
    state: State


def draft_for(turns: Sequence[Turn], policy: Policy, most: int, guard: Guard) -> None:
    """Draft for every text while that pays, and choose what is proposed: at most `most` tokens of each.

    This is the one place where texts are drafted for before a step, one after the other.
    """
    for turn in turns:
        guard(turn.text, partial(_draft, turn, policy, most))


def _draft(turn: Turn, policy: Policy, most: int) -> None:
    text, state = turn.text, turn.state
    begin = time.perf_counter()
    while (wanted := text.wanted(policy, state, during=False)) is not None:
        text.expand(policy, wanted, state, lambda under_way: True)
    text.spent = time.perf_counter() - begin if text.steps else 0.0
    text.choose(policy, state, most)


def draft_on(turns: Sequence[Turn], policy: Policy, guard: Guard, should_continue: ShouldContinue) -> None:
    """While the engine verifies: grow the text whose next outcome is the likeliest, until there is nothing to draft or
    the engine would have to wait."""
    wanted: dict[Turn, Expansion] = {}

    def ask(turn: Turn) -> None:
        if (found := turn.text.wanted(policy, turn.state, during=True)) is not None:
            wanted[turn] = found

    while should_continue(0):
        wanted.clear()
        for turn in turns:
            guard(turn.text, partial(ask, turn))
        if not wanted:
            break
        turn = max(wanted, key=lambda turn: turn.text.tree.reach_of(wanted[turn].choices[0]))
        guard(turn.text, partial(turn.text.expand, policy, wanted[turn], turn.state, should_continue))
