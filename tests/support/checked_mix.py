"""Texts of a made-up language that go through their rounds together: each is what it is alone, and what they share is
counted once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, cast

import pytest
from checked_loop import Case, CheckedDecoding
from language import CHUNK, LanguageDrafter, LanguageTarget, Trouble, step_of

from specbranch.core.messages import Drafted, Step, Trunk
from specbranch.core.tree import Proposals, Tree
from specbranch.loop import DecodingLoop, Turn
from specbranch.policies.costs import Costs, ForwardCost, ModeCosts
from specbranch.policies.policy import Expansion, Policy, State
from specbranch.replay.virtual_time import VirtualTime
from specbranch.stages import Failed, Nodes, OneByOne, Pending, Ready, ShouldContinue, Verifier

Forwards = list[tuple[float, float]]
"""Rows and seconds of each."""


@dataclass
class WatchedForward(ForwardCost):
    """seen: rows and seconds of every forward that was recorded."""

    seen: Forwards = field(default_factory=list)

    def record(self, rows: float, seconds: float) -> None:
        self.seen.append((rows, seconds))
        super().record(rows, seconds)


@dataclass
class WatchedMode(ModeCosts):
    """seen: seconds and tokens of every round that was recorded, and whether it says what a drafted token takes."""

    seen: list[tuple[float, int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.target, self.draft = WatchedForward(), WatchedForward()

    def record_round(self, seconds: float, tokens: int, drafted: bool = True) -> None:
        self.seen.append((seconds, tokens, drafted))
        super().record_round(seconds, tokens, drafted)


@dataclass
class WatchedCosts(Costs):
    """shares: of every round, the seconds and tokens of texts that the draft has read, and how many they are."""

    shares: list[tuple[float, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.serial, self.overlapped = WatchedMode(self.size), WatchedMode(self.size)

    def record_drafted(self, seconds: float, tokens: int, texts: int = 1) -> None:
        self.shares.append((seconds, tokens, texts))
        super().record_drafted(seconds, tokens, texts)

    def seen(self, overlapped: bool) -> tuple[Forwards, Forwards, list[tuple[float, int, bool]]]:
        """What was recorded of a mode since this was asked last: forwards of the target, of the draft, and rounds."""
        mode = self.mode(overlapped)
        assert isinstance(mode, WatchedMode)
        assert isinstance(mode.target, WatchedForward)
        assert isinstance(mode.draft, WatchedForward)
        found = list(mode.target.seen), list(mode.draft.seen), list(mode.seen)
        for each in (mode.target.seen, mode.draft.seen, mode.seen):
            each.clear()
        return found


class WatchedPolicy:
    """sharing: of the newest state that it looked at before there is a trunk."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.sharing = policy, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        self.sharing = state.sharing
        return self._policy.draft_before(tree, state)


@dataclass(frozen=True)
class Call:
    """A step of the target, or some of the draft, that texts shared. asked: their stages. answered: those of texts that
    have no error."""

    steps: list[Step]
    asked: list[object]
    answered: list[object]


@dataclass
class Shared:
    """Forwards that texts share: one over all their rows takes its time once. calls: of the round so far, the target's
    first where there is one."""

    time: VirtualTime
    target_cost: tuple[float, float]
    draft_cost: tuple[float, float]
    policies: dict[int, WatchedPolicy] = field(default_factory=dict)
    judged: Call | None = None
    drafted: list[Call] = field(default_factory=list)

    def begin_round(self) -> None:
        self.judged, self.drafted = None, []

    def verify(self, texts: Sequence[tuple[Verifier, Trunk]]) -> Sequence[Pending]:
        assert self.judged is None, "the target runs twice in a round"
        found = [_judged(cast(LanguageTarget, verifier), trunk) for verifier, trunk in texts]
        step = step_of(self.time, self.target_cost, sum(len(trunk) for _, trunk in texts))
        verifiers = [cast(LanguageTarget, verifier) for verifier, _ in texts]
        answered = [each for each, said in zip(verifiers, found, strict=True) if not isinstance(said, Trouble)]
        self.judged = Call([step], list(verifiers), list(answered))
        return [
            Failed(said) if isinstance(said, Trouble) else Ready(verifier.say(*said, step))
            for verifier, said in zip(verifiers, found, strict=True)
        ]

    def propose(self, texts: Sequence[Nodes], steps: int, should_continue: ShouldContinue) -> list[Drafted | Exception]:
        drafters = [cast(LanguageDrafter, drafter) for drafter, _, _ in texts]
        for drafter in drafters if self.judged is None else ():
            assert self.policies[id(drafter)].sharing == len(texts), "a step that others share than was said"
        running = [drafter.run(tree, nodes, steps) for drafter, (_, tree, nodes) in zip(drafters, texts, strict=True)]
        found: list[list[list[Proposals]]] = [[] for _ in texts]
        errors: dict[int, Exception] = {}
        taken: list[Step] = []
        while len(errors) < len(texts):
            going = [place for place in range(len(texts)) if place not in errors]
            for place in going:
                try:
                    found[place].append(next(running[place]))
                except Trouble as error:
                    errors[place] = error
            taken.append(step_of(self.time, self.draft_cost, sum(len(texts[place][2]) for place in going)))
            if len(taken) == steps or not should_continue(0):
                break
        answered = [drafter for place, drafter in enumerate(drafters) if place not in errors]
        for drafter in answered:
            drafter.steps += taken
        self.drafted.append(Call(taken, list(drafters), list(answered)))
        return [errors.get(place, Drafted(rows, taken)) for place, rows in enumerate(found)]


def _judged(verifier: LanguageTarget, trunk: Trunk) -> tuple[tuple[int, ...], int] | Trouble:
    try:
        return verifier.judge(trunk)
    except Trouble as error:
        return error


@dataclass(eq=False)
class Text:
    """One text of a mix. fails: it has to end in an error, unless it ends before. read: tokens, by both models.
    waited: rounds in which nothing of it was read, though there was something to read."""

    case: Case
    decoding: CheckedDecoding
    fails: bool
    tokens: list[int] = field(default_factory=list)
    read: int = 0
    waited: int = 0

    @property
    def costs(self) -> str:
        """Of which costs: a text with retrieval has others."""
        return f"{self.case.method} {bool(self.case.retrieval)}"


@dataclass(frozen=True)
class Mix:
    """Texts drawn at random from a seed. joins: the round that each begins with. fails: what of it raises, and at which
    trunk, step or look-up. rests: share of rounds that a text is left out of. shared: steps are, else each text has
    its own. chunk: tokens of prompts that are read before a round."""

    seed: int
    cases: tuple[Case, ...]
    joins: tuple[int, ...]
    fails: tuple[tuple[str, int], ...]
    rests: float
    shared: bool
    chunk: float

    @staticmethod
    def draw(seed: int, methods: Sequence[str], overlap: bool | None, shared: bool = True) -> Mix:
        """overlap: what all of them are told."""
        chance = Random(f"mix {overlap} {seed}")
        count = chance.randint(2, 5)
        cases = [Case.draw(100 * seed + text, chance.choice(methods), overlap) for text in range(count)]
        pair = cases[0]
        return Mix(
            seed,
            tuple(
                replace(
                    case,
                    language=pair.language,
                    target_cost=pair.target_cost,
                    draft_cost=pair.draft_cost,
                    read_costs=pair.read_costs,
                )
                for case in cases
            ),
            tuple(chance.choice((0, 0, 0, 1, 2, 5, 9)) for _ in cases),
            tuple(
                (chance.choice(("verify", "draft", "draft", "read", "retrieve")), chance.randint(1, 8))
                if chance.random() < 0.3
                else ("", 0)
                for _ in cases
            ),
            chance.choice((0.0, 0.0, 0.2)),
            shared,
            chance.choice((math.inf, math.inf, 1, CHUNK, 3 * CHUNK)),
        )

    def run(self) -> list[Text]:
        """Decode them and check. Returns what became of each."""
        time, chance = VirtualTime(), Random(self.seed)
        shared = Shared(time, self.cases[0].target_cost, self.cases[0].draft_cost)
        loop = DecodingLoop(time, shared if self.shared else OneByOne(), self.chunk)
        costs: defaultdict[tuple[str, int], WatchedCosts] = defaultdict(WatchedCosts)
        texts = [self._text(place, time, shared) for place in range(len(self.cases))]
        live: list[Text] = []
        number = 0
        while live or number <= max(self.joins):
            for text, joins in zip(texts, self.joins, strict=True):
                if joins == number:
                    text.decoding.costs = costs[text.costs, 1]
                    text.decoding.begin(text.case.prompt, text.case.new_tokens)
                    live.append(text)
            number += 1
            asked = [text for text in live if chance.random() >= self.rests]
            if not asked:
                continue
            for text in asked:
                text.decoding.costs = costs[text.costs, len(asked)]
            shared.begin_round()
            try:
                turns = loop.round([text.decoding for text in asked])
            except Trouble as error:
                raise AssertionError("one text's error ends the round of all") from error
            self._check_reading(asked, turns)
            if self.shared:
                check_round(turns, shared)
            live = [text for text in live if text not in asked or self._goes_on(text, turns[asked.index(text)])]
        return texts

    def _text(self, place: int, time: VirtualTime, shared: Shared) -> Text:
        case, (stage, number) = self.cases[place], self.fails[place]
        decoding = case.decoding(WatchedCosts(), time)
        policy = WatchedPolicy(decoding.policy)
        decoding.policy = cast(Policy, policy)
        draft = decoding.drafter
        if stage == "verify":
            decoding.verifier.fails = number
        if stage == "retrieve" and decoding.retriever is not None:
            decoding.retriever.fails = number
        if draft is not None:
            shared.policies[id(draft)] = policy
            draft.fails, draft.unreadable = (number if stage == "draft" else 0), stage == "read"
        return Text(case, decoding, bool(stage))

    def _check_reading(self, asked: Sequence[Text], turns: Sequence[Turn]) -> None:
        """As much of prompts is read as may be, and nobody waits for it longer than until the others had their turn."""
        before = [text.read for text in asked]
        for text in asked:
            target, draft = text.decoding.verifier, text.decoding.drafter
            by_draft = 0 if draft is None else draft.has_read
            text.read = min(len(target.text), len(target.prompt)) + by_draft
        read = [text.read - earlier for text, earlier in zip(asked, before, strict=True)]
        counted = sum(count for count, turn in zip(read, turns, strict=True) if turn.error is None)
        assert counted <= self.chunk + CHUNK - 1, "more of prompts is read than is allowed"
        for text, count in zip(asked, read, strict=True):
            waits = not count and not text.decoding.ready
            text.waited = text.waited + 1 if waits else 0
            assert text.waited <= len(self.cases), "a prompt is not read for too long"

    def _goes_on(self, text: Text, turn: Turn) -> bool:
        """Check what a round made of a text, and, when it is over, what the text says of itself."""
        assert turn.text is text.decoding, "another text's turn"
        decoding, case = text.decoding, text.case
        if turn.error is not None:
            if not isinstance(turn.error, Trouble):
                raise turn.error
            assert text.fails, "an error of another text"
            assert not turn.committed, "a text commits in spite of its error"
            assert decoding.text == [*case.prompt, *text.tokens], "a text commits in spite of its error"
            decoding.learn()
            return False
        if not decoding.ready:
            assert not turn.committed, "a text commits before its prompt is read"
            assert self.chunk < math.inf, "a prompt is not read"
            return True
        case.check_round(text.tokens, turn.committed)
        dropped = case.left_after is not None and len(decoding.stats.log) > case.left_after
        if decoding.remaining and not dropped:
            return True
        decoding.learn()
        case.check_end(decoding, text.tokens)
        if self.chunk == math.inf:
            case.check_reading(decoding)
        return False


def check_round(turns: Sequence[Turn], shared: Shared) -> None:
    """Every step is there once, with the rows of all texts, in the statistics of each and in the costs of each kind."""
    assert len(turns) == len({id(turn.text) for turn in turns}), "a text twice in a round"
    texts = [cast(CheckedDecoding, turn.text) for turn in turns]
    done = [(turn, text) for turn, text in zip(turns, texts, strict=True) if turn.ready]
    for turn, text in done:
        assert turn.committed, "a round that commits nothing"
        assert shared.judged is not None
        (step,) = shared.judged.steps
        assert [*map(id, text.stats.log[-1].target)] == [id(step)], "another step than the target's"
        drafted = [step for call in shared.drafted if text.drafter in call.answered for step in call.steps]
        assert [*map(id, text.stats.log[-1].draft)] == [*map(id, drafted)], "other steps than the draft's"
    if done and shared.judged is not None:
        rows = sum(
            len(turn.trunk) for turn in turns if cast(CheckedDecoding, turn.text).verifier in shared.judged.asked
        )
        assert shared.judged.steps[0].rows == rows, "rows of another number of texts"
    overlapped = any(turn.state.overlapped for turn in turns if hasattr(turn, "state"))
    tokens = sum(len(turn.committed) for turn in turns)
    for costs in {id(text.costs): cast(WatchedCosts, text.costs) for text in texts}.values():
        mine = [text for text in texts if text.costs is costs]
        committed = [(turn, text) for turn, text in done if text.costs is costs]
        target, draft, rounds = costs.seen(overlapped)
        assert costs.seen(not overlapped) == ([], [], []), "recorded of the other mode"
        step_costs = [(step.rows, step.seconds) for step in shared.judged.steps] if committed and shared.judged else []
        assert target == step_costs, "the target's step is not recorded once"
        calls = [call for call in shared.drafted if call.answered and any(text.drafter in call.asked for text in mine)]
        steps = [step for call in calls for step in call.steps]
        assert [rows for rows, _ in draft] == [step.rows for step in steps], "the draft's steps are not recorded once"
        took = sum(step.seconds for step in steps)
        assert math.isclose(sum(seconds for _, seconds in draft), took), "other seconds than the draft's"
        reading = [text for _, text in committed if text.drafting]
        seconds = committed[0][1].stats.log[-1].seconds if committed else 0.0
        free = sum(text.stats.log[-1].retrieved_accepted + text.stats.log[-1].forced_accepted for _, text in done)
        telling = bool(reading) and 2 * free <= tokens
        assert rounds == ([(seconds, tokens, telling)] if committed else []), "the round is not recorded once"
        shares = [(share_of(turn, done), len(turn.committed)) for turn, text in committed if text.drafting]
        expected = [(*map(sum, zip(*shares, strict=True)), len(shares))] if shares else []
        assert costs.shares == [pytest.approx(each) for each in expected], "a text's share of the round"
        costs.shares.clear()


def share_of(turn: Turn, done: Sequence[tuple[Turn, CheckedDecoding]]) -> float:
    """The seconds of a round that a text counts as its own: a plain token's, and where it drafted, of what is left."""
    seconds = done[0][1].stats.log[-1].seconds
    drafted = [other for other, text in done if text.stats.log[-1].draft or len(other.trunk) > 1]
    if not drafted or len(drafted) == len(done):
        return seconds / len(done)
    costs = drafted[0].text.costs
    if not costs.serial.target.known:
        return seconds / len(done)
    return (seconds - costs.plain * (len(done) - len(drafted))) / len(drafted) if turn in drafted else costs.plain
