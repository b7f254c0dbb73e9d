"""Replays: any policy over a record, in virtual time, without models.

The decoding loop is the real one (loop.py), and so is retrieval, which takes no forward and here no time; only drafter,
verifier and workers are replaced by what was recorded and by given costs of forwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from specbranch.core.excerpt import Excerpt
from specbranch.core.messages import Drafted, Forecast, Step, Trunk, Verdict
from specbranch.core.stats import Stats
from specbranch.core.tree import MOST_NODES, Proposals, Signals, Tree
from specbranch.decoding import Decoding
from specbranch.drafters.retrieval import RetrievalDrafter
from specbranch.loop import DecodingLoop
from specbranch.policies.calibration import Calibrator
from specbranch.policies.costs import Costs
from specbranch.policies.policy import Policy
from specbranch.replay.costs import ReplayCosts
from specbranch.replay.record import TAIL, Record, RecordedProposals, RecordedText
from specbranch.replay.recorded_matcher import constrained
from specbranch.replay.virtual_time import VirtualTime
from specbranch.stages import Ready, ShouldContinue

# Ids that no vocabulary has, for tokens that are not recorded, so that nothing is retrieved by them.
UNKNOWN_PROMPT = 2**30
UNKNOWN_DRAFT = 2**29


class Predictor(Protocol):
    """H-RAD's network: runtime/hrad/predictor.py."""

    def predict(self, features: Any) -> Forecast: ...


@dataclass
class ReplayVerifier:
    """The target's part: the recorded tokens."""

    text: RecordedText
    time: VirtualTime
    costs: ReplayCosts
    predictor: Predictor | None = None
    most_rows = MOST_NODES

    def __post_init__(self) -> None:
        self._tokens = self.text.tokens.tolist()

    def most_tokens(self, position: int) -> int:
        return len(self.text)

    def begin(self, prompt: Sequence[int]) -> int:
        return len(prompt) - 1

    def read(self, most: float) -> int:
        return self.text.prompt_tokens - 1  # in no time: it is the same for all methods

    def commit(self, path: Sequence[int]) -> None:
        self.time.now += self.costs.round

    def verify(self, trunk: Trunk) -> Ready:
        line = self.costs.overlapped_target if self.time.overlapped else self.costs.serial_target
        begin, self.time.now = self.time.now, self.time.now + line(len(trunk))
        step = Step(begin, self.time.now, len(trunk))
        at = trunk.position - self.text.prompt_tokens + 1
        path: list[int] = []
        while True:
            last, place = path[-1] if path else 0, at + len(path)
            token = self._tokens[place] if place < len(self._tokens) else -1
            children = (i for i, parent in enumerate(trunk.parents) if parent == last and trunk.tokens[i] == token)
            if (child := next(children, None)) is None:
                return Ready(Verdict(tuple(path), token, step, self._forecast(place + 1)))
            path.append(child)

    def _forecast(self, at: int) -> Forecast | None:
        if self.predictor is None or self.text.features is None or at >= len(self.text):
            return None
        return self.predictor.predict(self.text.features[at])


@dataclass
class ReplayDrafter:
    """The draft's part: what it proposed along the text, and off it what it proposed behind a wrong token."""

    text: RecordedText
    time: VirtualTime
    costs: ReplayCosts
    candidates: int
    calibrator: Calibrator | None
    room: int = MOST_NODES
    burst: int = 1
    forecast: Forecast | None = None
    _ran: set[int] = field(default_factory=set)
    _has_read: bool = False
    _seen: int = 0
    _position: int = 0

    def __post_init__(self) -> None:
        self._tokens = self.text.tokens.tolist()
        self._along = _rows(self.text.proposals)
        self._tails = _rows(self.text.tails)
        self._turns = [i for i in range(len(self.text)) if self._tails[i * TAIL][0][0] >= 0]

    def begin(self, prompt: Sequence[int]) -> None:
        self._position = len(prompt) - 1

    def gap(self, excerpt: Excerpt, tokens: int) -> range:
        return excerpt.gap(self.text.prompt_tokens)

    def unread(self, excerpt: Excerpt, tokens: int) -> int:
        return 0 if self._has_read else self._position - len(self.gap(excerpt, tokens))

    def read(self, excerpt: Excerpt, tokens: int, most: float) -> int:
        unread = self.unread(excerpt, tokens)
        self._has_read, self._seen = True, self.text.prompt_tokens - 1
        return unread

    def commit(self, path: Sequence[int], survivors: Mapping[int, int], tokens: Sequence[int]) -> None:
        self._position += len(tokens)
        self._seen += len([node for node in path if node in self._ran])
        self._ran = {survivors[node] for node in self._ran if node in survivors}
        self.room = MOST_NODES - len(self._ran)

    def propose(
        self,
        tree: Tree,
        nodes: Sequence[int],
        steps: int = 1,
        should_continue: ShouldContinue = lambda under_way: True,
    ) -> Drafted:
        backlog = max(0, tree.position - self._seen) if 0 in nodes else 0
        self._seen += backlog
        line = self.costs.overlapped_draft if self.time.overlapped else self.costs.serial_draft
        start = tree.position - self.text.prompt_tokens + 1
        paths = [tree.tokens(tree.path(node)[1:]) for node in nodes]
        proposals: list[list[Proposals]] = []
        done: list[Step] = []
        while len(done) < steps and (not done or should_continue(0)):
            if proposals:
                for path, (tokens, _, _) in zip(paths, proposals[-1], strict=True):
                    path.append(tokens[0])
            begin, self.time.now = self.time.now, self.time.now + line(len(nodes) + backlog)
            done.append(Step(begin, self.time.now, len(nodes) + backlog))
            backlog = 0
            found = [self._proposals(start, path) for path in paths]
            if not proposals:  # what was retrieved stands below the given nodes only
                found = [_related(tree, node, each) for node, each in zip(nodes, found, strict=True)]
            proposals.append(found if self.calibrator is None else self.calibrator.correct(found))
        self._ran.update(nodes, range(len(tree), len(tree) + len(nodes) * (len(done) - 1)))
        self.room -= len(nodes) * len(done)
        return Drafted(proposals, done)

    def learn(self, tree: Tree, path: Sequence[int], next_token: int, forecast: Forecast | None) -> None:
        if self.calibrator is not None:
            self.calibrator.observe(tree, path, next_token)
        self.forecast = forecast

    def _proposals(self, start: int, path: list[int]) -> Proposals:
        tokens, confidence, entropy, margin = self._row(start, path)
        there, depth = sum(token >= 0 for token in tokens), len(path)  # fewer where a constraint allowed no more
        count = min(self.candidates, there)
        log_odds = 0.0 if self.forecast is None else self.forecast.log_odds(depth)
        signals = Signals(confidence[0], entropy, margin, depth, log_odds)
        return Proposals(tuple(tokens[:count]), tuple(confidence[:count]), signals)

    def _row(self, start: int, path: list[int]) -> Row:
        """What the draft proposed after a path of tokens that begins at the text's token `start`. Off the text: its
        tail there; where none is recorded, the confidences of another one, with ids that match nothing."""
        expected = self._tokens[start : start + len(path)]
        wrong = next((i for i, token in enumerate(path) if i >= len(expected) or token != expected[i]), None)
        position = start + len(path)
        if wrong is None:
            return self._along[min(position, len(self._along) - 1)]
        turn, behind = start + wrong, path[wrong + 1 :]
        step = len(behind)
        if self._is_tail(turn, path[wrong], behind):
            return self._tails[turn * TAIL + step]
        if self._turns and (turn >= len(self.text) or self._tails[turn * TAIL][0][0] < 0):
            turn = self._turns[turn % len(self._turns)]  # not the draft's first choice there: another wrong turn's tail
        rows = self._tails if self._turns else self._along
        index = turn * TAIL + step % TAIL if self._turns else position % len(rows)
        tokens, confidence, entropy, margin = rows[index]
        return [UNKNOWN_DRAFT + i for i in range(len(tokens))], confidence, entropy, margin

    def _is_tail(self, turn: int, token: int, behind: list[int]) -> bool:
        """Whether a wrong token and those behind it are the draft's own first choices, and it is known what comes."""
        if turn >= len(self.text) or token != self._along[turn][0][0] or len(behind) >= TAIL:
            return False
        return behind == [self._tails[turn * TAIL + i][0][0] for i in range(len(behind))]


Row = tuple[list[int], list[float], float, float]
"""Tokens, confidence in each, entropy, margin."""


def _rows(rows: RecordedProposals) -> list[Row]:
    return list(
        zip(rows.tokens.tolist(), rows.agreement.tolist(), rows.entropy.tolist(), rows.margin.tolist(), strict=True)
    )


def _related(tree: Tree, node: int, proposals: Proposals) -> Proposals:
    """The same, told what was retrieved after the node, as Tree.relate does."""
    assert proposals.signals is not None
    odds = tree.retrieved_odds(node, proposals.tokens[0])
    return proposals._replace(signals=proposals.signals._replace(retrieved=odds)) if odds else proposals


def replay(
    record: Record,
    policy: Policy,
    costs: ReplayCosts,
    overlap: bool | None,
    texts: Sequence[RecordedText] | None = None,
    predictor: Predictor | None = None,
    retrieval: bool = False,
    draft: bool = True,
) -> list[Stats]:
    """Decode every recorded text again with another policy, in virtual seconds.

    overlap: True, False, or None to let measured costs choose, as `overlap="auto"` does. The calibrator and the
    measured costs are carried from text to text, as in a running engine. retrieval: what followed the same tokens
    before, in the text, is drafted too; in its prompt as well where the record holds that. draft: False leaves the
    draft model out. What the record says was forced is drafted without it.
    """
    measured = Costs(costs.serial_draft(1) / costs.serial_target(1))  # about what the models' sizes say
    calibrator = Calibrator()
    results = []
    for text in texts if texts is not None else record.texts:
        time = VirtualTime()
        drafter = None
        if draft and policy.candidates > 0:
            drafter = ReplayDrafter(text, time, costs, policy.candidates, calibrator if policy.calibrated else None)
        retriever = RetrievalDrafter(calibrator) if retrieval else None
        verifier = ReplayVerifier(text, time, costs, predictor)
        under = constrained(text)
        decoding = Decoding(verifier, drafter, policy, measured, time, overlap, retriever=retriever, constraint=under)
        count = 0
        for committed in DecodingLoop(time).rounds(decoding, _prompt(text), len(text)):
            count += len(committed)
        decoding.stats.seconds = time.now
        decoding.stats.new_tokens = count
        results.append(decoding.stats)
    return results


def _prompt(text: RecordedText) -> list[int]:
    """Its tokens; where they are not known, as many that are all different."""
    if text.prompt_ids is None:
        return list(range(UNKNOWN_PROMPT, UNKNOWN_PROMPT + text.prompt_tokens))
    ids: list[int] = text.prompt_ids.tolist()
    return ids
