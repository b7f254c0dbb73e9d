"""Drafts for all texts of a step: before the engine verifies, and while it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from specbranch.core.messages import Step
from specbranch.policies.policy import Expansion, Policy, State
from specbranch.proposer.text import Text
from specbranch.stages import ShouldContinue
from specbranch.together import Together

FORWARDS = Together()

Guard = Callable[[Text, Callable[[], None]], None]
"""Does some work for a text; a fault in it ends the drafting of that text, and nothing else."""


@dataclass(frozen=True, eq=False)
class Turn:
    """A text, and what a policy may look at besides its tree."""

    text: Text
    state: State


Fail = Callable[[Text, Exception], None]
"""Ends the drafting of a text."""


def draft_for(turns: Sequence[Turn], policy: Policy, most: int, guard: Guard, fail: Fail) -> None:
    """Draft for the texts while that pays, steps of all in the same forwards, and choose what is proposed: of each at
    most `most` tokens."""
    begin, asking = time.perf_counter(), list(turns)
    while asking := [turn for turn in asking if not turn.text.failed]:
        wanted = _wanted(asking, policy, guard, during=False)
        if len(wanted) == len(asking):
            _expand(wanted, policy, fail, lambda under_way: True)
        asking = list(wanted)
    drafted = [turn for turn in turns if turn.text.steps]
    for turn in drafted:
        turn.text.spent = (time.perf_counter() - begin) / len(drafted)
    for turn in turns:
        guard(turn.text, partial(turn.text.choose, policy, turn.state, most))


def draft_on(turns: Sequence[Turn], policy: Policy, guard: Guard, fail: Fail, should_continue: ShouldContinue) -> None:
    """While the engine verifies: grow the texts where their next outcomes are the likeliest, until there is nothing to
    draft or the engine would have to wait."""
    while should_continue(0):
        wanted = _wanted([turn for turn in turns if not turn.text.failed], policy, guard, during=True)
        if not wanted:
            break
        _expand(wanted, policy, fail, should_continue)


def _wanted(turns: Sequence[Turn], policy: Policy, guard: Guard, during: bool) -> dict[Turn, Expansion]:
    """What the policy wants to draft next, if these texts share the step."""
    wanted: dict[Turn, Expansion] = {}

    def ask(turn: Turn) -> None:
        state = replace(turn.state, sharing=len(turns))
        if (found := turn.text.wanted(policy, state, during)) is not None:
            wanted[turn] = found

    for turn in turns:
        guard(turn.text, partial(ask, turn))
    return wanted


def _expand(wanted: Mapping[Turn, Expansion], policy: Policy, fail: Fail, should_continue: ShouldContinue) -> None:
    """Run the draft there, in the same forwards, and make nodes of as many of its candidates as the policy wants. What
    is wrong with a forward ends the drafting of all its texts."""
    begin, turns = time.perf_counter(), list(wanted)
    steps = min(expansion.steps for expansion in wanted.values())
    try:
        asked = [turn.text.take(wanted[turn]) for turn in turns]
        drafted = FORWARDS.propose(asked, steps, should_continue)
    except Exception as error:
        drafted = [error] * len(turns)
    taken: Sequence[Step] = ()
    for turn, found in zip(turns, drafted, strict=True):
        try:
            if isinstance(found, Exception):
                raise found
            turn.text.grow(policy, asked[turns.index(turn)][2], found)
            taken = found.steps
        except Exception as error:
            fail(turn.text, error)
    for step in taken:  # the host's part too
        turns[0].state.costs.draft.record(step.rows, (time.perf_counter() - begin) / len(taken))
