"""The decoding loop: draft, choose a trunk, verify it while the draft goes on, commit.

Every method is this loop with another policy. Texts may go through a round together: a draft step of all is one
forward, and so are their trunks. What a text decides and keeps is in decoding.py.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from specbranch.core.messages import Trunk, Verdict
from specbranch.decoding import Decoding
from specbranch.policies.policy import NOTHING, Expansion, InFlight, State
from specbranch.policies.reading import Unread
from specbranch.stages import Forwards, OneByOne, PendingVerdicts, ShouldContinue, Verdicts, Workers


@dataclass(eq=False)
class Turn:
    """One text's part in a round. error: of this text alone, which then is over. share: seconds that it has cost."""

    text: Decoding
    state: State = field(init=False)
    expansion: Expansion = NOTHING
    steps: int = 0
    flight: InFlight | None = None  # once there is a trunk
    trunk: Trunk = field(init=False)
    verdict: Verdict = field(init=False)
    error: Exception | None = None
    committed: list[int] = field(default_factory=list)
    share: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether it may decode."""
        return self.error is None and self.text.ready

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """What is raised within concerns this text only."""
        try:
            yield
        except Exception as error:
            self.error = error


class DecodingLoop:
    """Rounds of texts over one pair of models. forwards: how texts share them. chunk: about how many tokens of prompts
    are read before a round, so that a long one does not keep the others waiting."""

    def __init__(self, workers: Workers, forwards: Forwards | None = None, chunk: float = math.inf) -> None:
        self.workers, self.forwards, self.chunk = workers, forwards or OneByOne(), chunk
        self.clock = workers.clock

    def rounds(self, text: Decoding, prompt: Sequence[int], max_new_tokens: int) -> Generator[list[int], None, None]:
        """Yield the tokens that each round of one text commits, at most `max_new_tokens` in all, for as long as it is
        asked."""
        text.begin(prompt, max_new_tokens)
        try:
            while text.remaining > 0:
                (turn,) = self.round([text])
                if turn.error is not None:
                    raise turn.error
                yield turn.committed
        finally:
            self.workers.wait()
            text.learn()

    def round(self, texts: Sequence[Decoding]) -> list[Turn]:
        """One round of texts that are not over. Each commits a token at least, or is still being read, or has an error;
        what goes wrong for all of them is raised."""
        turns = self.read(texts)
        self.play(turns)
        return turns

    def read(self, texts: Sequence[Decoding]) -> list[Turn]:
        """Read on, where texts are not read: the target its prompts, then the draft. Those that wait longest go
        first."""
        turns, left = [Turn(text) for text in texts], self.chunk
        waiting = sorted(turns, key=lambda turn: turn.text.read_at)
        for turn in waiting:
            with turn.own_errors():
                left -= turn.text.read_prompt(left) if left > 0 else 0
        self._choose_reading(turns)
        for turn in waiting:
            with turn.own_errors():
                left -= turn.text.read_draft(left) if left > 0 else 0
        return turns

    def _choose_reading(self, turns: Sequence[Turn]) -> None:
        """What the draft is to read: of texts with the same costs that is decided together."""
        groups: dict[tuple[int, int], list[tuple[Decoding, Unread]]] = {}
        for turn in turns:
            with turn.own_errors():
                if turn.error is None and (unread := turn.text.unread()) is not None:
                    groups.setdefault((id(turn.text.costs), id(turn.text.reading)), []).append((turn.text, unread))
        for group in groups.values():
            first = group[0][0]
            drafting = sum(turn.text.drafting and turn.text.costs is first.costs for turn in turns)
            excerpts = first.reading.choose([unread for _, unread in group], drafting, self.chunk == math.inf)
            for (text, _), excerpt in zip(group, excerpts, strict=True):
                text.excerpt = excerpt

    def play(self, turns: Sequence[Turn]) -> None:
        """The rest of a round, for texts that are read."""
        ready = [turn for turn in turns if turn.ready]
        may = [turn.text for turn in ready if turn.text.may_overlap]
        overlapped = bool(may) and may[0].choose_overlap(sum(text.saved for text in may))
        begin = self.clock()
        for turn in ready:
            turn.state = turn.text.state(overlapped)
            turn.text.stats.begin_round(begin, turn.state.overlapped)
            with turn.own_errors():
                turn.text.extend()
        self._draft_before([turn for turn in _going(ready) if turn.text.drafting], overlapped)
        asked = _going(ready)
        if not asked:
            return
        for turn in asked:
            turn.flight = turn.text.choose_trunk(turn.state)
            turn.trunk = Trunk.of(turn.text.tree, turn.flight.nodes)
        verify = partial(self.forwards.verify, [(turn.text.verifier, turn.trunk) for turn in asked])
        if overlapped:
            verdicts = self.workers.submit(verify)
            for turn in asked:
                with turn.own_errors():
                    assert turn.flight is not None
                    turn.text.ask_constraint(turn.flight)
            self._draft_during(asked, verdicts)
        else:
            verdicts = PendingVerdicts(verify())
        results = verdicts.results()
        seconds = self.clock() - begin
        committed = [turn for turn, verdict in zip(asked, results, strict=True) if self._commit(turn, verdict)]
        if committed:
            self._measure(committed, overlapped, begin, seconds)

    def _draft_before(self, turns: list[Turn], overlapped: bool) -> None:
        """Draft while that is worth a step: what it costs is shared by the texts that want it."""
        while turns:
            for turn in turns:
                state = turn.state if len(turns) == 1 else replace(turn.state, sharing=len(turns))
                turn.expansion = turn.text.draft_before(state)
                turn.steps = turn.text.steps(turn.expansion)
            wanting = [turn for turn in turns if turn.steps]
            if len(wanting) == len(turns):
                self._expand(turns, overlapped, lambda under_way: True)
            turns = _going(wanting)

    def _draft_during(self, turns: list[Turn], verdicts: Verdicts) -> None:
        """Grow branches until the target is done, or until it would have to wait for the next step."""
        begin, drafting = self.clock(), [turn for turn in turns if turn.text.drafting]
        if not drafting:
            return
        first, trunks = drafting[0].text, sum(len(turn.trunk) for turn in turns)
        cost = first.costs.overlapped

        def should_continue(under_way: int) -> bool:
            """Whether one more step would end with the target, or at most half a step later."""
            if verdicts.done():
                return False
            if not cost.target.known or first.stats.overlapped_rounds < 2:
                return True
            left = cost.target.of(trunks) - (self.clock() - begin)
            rows = sum(len(turn.expansion.choices) for turn in wanting)
            return left >= (under_way + 0.5) * cost.draft.of(rows)

        with self.workers.draft_threads():
            while not verdicts.done():
                for turn in drafting:
                    assert turn.flight is not None
                    turn.expansion = turn.text.draft_during(turn.flight, turn.state)
                    turn.steps = turn.text.steps(turn.expansion)
                wanting = [turn for turn in _going(drafting) if turn.steps]
                if not wanting or not should_continue(0):
                    break
                self._expand(wanting, True, should_continue)

    def _expand(self, turns: list[Turn], overlapped: bool, should_continue: ShouldContinue) -> None:
        """Run the draft where the policies want, in the same forwards."""
        for turn in turns:
            turn.text.learn()
        begin = self.clock()
        asked = [turn.text.take(turn.expansion) for turn in turns]
        drafted = self.forwards.propose(asked, min(turn.steps for turn in turns), should_continue)
        for turn, (_, _, nodes), found in zip(turns, asked, drafted, strict=True):
            if isinstance(found, Exception):
                turn.error = found
            else:
                with turn.own_errors():
                    turn.text.grow(nodes, found, turn.flight)
        taken = max((found.steps for found in drafted if not isinstance(found, Exception)), key=len, default=[])
        for costs in {id(turn.text.costs): turn.text.costs for turn in turns}.values():
            for step in taken:  # the host's part too: a row must be worth that as well
                costs.mode(overlapped).draft.record(step.rows, (self.clock() - begin) / len(taken))

    def _commit(self, turn: Turn, verdict: Verdict | Exception) -> bool:
        if isinstance(verdict, Exception):
            turn.error = turn.error or verdict
        elif turn.error is None and turn.flight is not None:
            with turn.own_errors():
                turn.verdict, turn.committed = verdict, turn.text.commit(turn.flight, verdict)
        return turn.error is None

    def _measure(self, turns: list[Turn], overlapped: bool, begin: float, seconds: float) -> None:
        """Keep what the round cost and gave, for the rounds to come. seconds: until its verdicts were there."""
        end, tokens = self.clock(), sum(len(turn.committed) for turn in turns)
        by_costs: dict[int, list[Turn]] = {}
        for turn in turns:
            by_costs.setdefault(id(turn.text.costs), []).append(turn)
        for mine in by_costs.values():
            costs, step = mine[0].text.costs, mine[0].verdict.step
            costs.mode(overlapped).target.record(step.rows, step.seconds)
        for turn, share in zip(turns, _shares(turns, end - begin, seconds), strict=True):
            turn.share = share
            turn.text.measure(turn.state, turn.trunk, turn.verdict, len(turn.committed), share, end)
        for mine in by_costs.values():
            costs, drafting = mine[0].text.costs, [turn for turn in mine if turn.text.drafting]
            costs.idle += sum(turn.share for turn in mine if not turn.text.drafting)
            costs.mode(overlapped).record_round(end - begin, tokens, bool(drafting) and not _copied(turns))
            if drafting:
                committed = sum(len(turn.committed) for turn in drafting)
                costs.record_drafted(sum(turn.share for turn in drafting), committed, len(drafting))


def _shares(turns: Sequence[Turn], round: float, seconds: float) -> list[float]:
    """What each text has cost of a round: those that drafted pay for what a plain round would not have taken. Else
    texts would gain by drafting what the others wait for. seconds: of the round, until its verdicts were there."""
    drafted = [turn.text.has_drafted(turn.trunk) for turn in turns]
    costs = next((turn.text.costs for turn, has in zip(turns, drafted, strict=True) if has), None)
    if costs is None or all(drafted) or not costs.serial.target.known:
        return [round / len(turns)] * len(turns)
    more = seconds - costs.plain * len(turns)
    return [(round - more) / len(turns) + (more / sum(drafted) if has else 0.0) for has in drafted]


def _copied(turns: Sequence[Turn]) -> bool:
    """Whether most tokens of a round were retrieved or forced. It says nothing of what a drafted one takes to come
    by."""
    rounds = [turn.text.stats.log[-1] for turn in turns]
    free = sum(round.retrieved_accepted + round.forced_accepted for round in rounds)
    return 2 * free > sum(round.tokens for round in rounds)


def _going(turns: Sequence[Turn]) -> list[Turn]:
    """Those of texts that are not over."""
    return [turn for turn in turns if turn.error is None]
