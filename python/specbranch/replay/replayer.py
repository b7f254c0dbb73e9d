"""Replays: any policy over a record, in virtual time, without models.

The decoding loop is the real one (decoder.py); only its drafter, verifier and workers are replaced by what was recorded
and by the costs of forwards that are given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from specbranch.core.messages import Step
from specbranch.core.stats import Stats
from specbranch.core.tree import Signals, Tree
from specbranch.drafters.model import Drafted, always, learn, note, stands
from specbranch.loop import Decoder
from specbranch.policies.calibration import Calibrator
from specbranch.policies.costs import Costs
from specbranch.policies.policy import Policy
from specbranch.replay.record import TAIL, Record, RecordedText, Said
from specbranch.runtime.cache import MAX_BACKLOG, TREE_ROWS
from specbranch.runtime.hrad.predictor import HRad, Outlook
from specbranch.runtime.verifier import Verdict
from specbranch.stages import Target

ROOM = TREE_ROWS - MAX_BACKLOG  # nodes that a draft may run over before a commit


@dataclass(frozen=True)
class Line:
    """Seconds of a forward by its rows, linear between the points and beyond the last two."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, rows: float) -> float:
        if len(self.points) == 1:
            return self.points[0][1]
        i = min(max(bisect_right(self.points, (rows, float("inf"))), 1), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[i - 1], self.points[i]
        return max(0.0, y0 + (y1 - y0) * (rows - x0) / (x1 - x0))


@dataclass(frozen=True)
class ReplayCosts:
    """Seconds of forwards by mode and model; round: seconds of a round outside the models."""

    serial_target: Line
    serial_draft: Line
    overlapped_target: Line
    overlapped_draft: Line
    round: float = 0.0

    @staticmethod
    def ratio(c: float, target_row: float = 0.0, draft_row: float = 0.0) -> ReplayCosts:
        """A target forward takes 1, a draft forward 1 / c, alone or together; each more row adds its share of that."""
        target = Line(((1, 1.0), (2, 1.0 + target_row)))
        draft = Line(((1, 1 / c), (2, (1 + draft_row) / c)))
        return ReplayCosts(target, draft, target, draft)

    @staticmethod
    def of(record: Record) -> ReplayCosts:
        """As measured when the record was made."""
        lines = {
            (mode, model): Line(tuple((rows, seconds) for rows, seconds in points))
            for mode, models in record.costs.items()
            for model, points in models.items()
        }
        return ReplayCosts(
            lines["serial", "target"],
            lines["serial", "draft"],
            lines["overlapped", "target"],
            lines["overlapped", "draft"],
            record.round_seconds,
        )


@dataclass
class VirtualTime:
    """Workers without threads: both sides' time is added up, and overlapping is arithmetic."""

    now: float = 0.0
    overlapped: bool = False

    def clock(self) -> float:
        return self.now

    def submit(self, target: Target, tree: Tree, trunk: Sequence[int]) -> VirtualPending:
        begin, self.overlapped = self.now, True
        verdict = target.verify(tree, trunk)
        end, self.now = self.now, begin
        return VirtualPending(self, verdict, end)

    @contextmanager
    def draft_threads(self) -> Iterator[None]:
        yield

    def wait(self) -> None:
        pass


@dataclass
class VirtualPending:
    time: VirtualTime
    verdict: Verdict
    end: float

    def done(self) -> bool:
        return self.time.now >= self.end

    def result(self) -> Verdict:
        self.time.now = max(self.time.now, self.end)
        self.time.overlapped = False
        return self.verdict


@dataclass
class ReplayVerifier:
    """The target's part: the recorded tokens."""

    text: RecordedText
    time: VirtualTime
    costs: ReplayCosts
    hrad: HRad | None = None
    most_rows = TREE_ROWS

    def prefill(self, tokens: Sequence[int]) -> None:
        pass

    def commit(self, path: Sequence[int]) -> None:
        self.time.now += self.costs.round

    def start(self, tree: Tree, trunk: Sequence[int]) -> VirtualPending:
        return self.time.submit(self, tree, trunk)

    def verify(self, tree: Tree, trunk: Sequence[int]) -> Verdict:
        line = self.costs.overlapped_target if self.time.overlapped else self.costs.serial_target
        begin, self.time.now = self.time.now, self.time.now + line(len(trunk))
        step = Step(begin, self.time.now, len(trunk))
        at = tree.position - self.text.prompt_tokens + 1
        path = [0]
        while True:
            token = int(self.text.tokens[at + len(path) - 1]) if at + len(path) - 1 < len(self.text) else -1
            child = next((i for i in tree.children(path[-1]) if i in trunk and tree.nodes[i].token == token), None)
            if child is None:
                return Verdict(tuple(path), token, step, self._outlook(at + len(path)))
            path.append(child)

    def _outlook(self, at: int) -> Outlook | None:
        if self.hrad is None or self.text.features is None or at >= len(self.text):
            return None
        return self.hrad.predict(self.text.features[at])


@dataclass
class ReplayDrafter:
    """The draft's part: what it said along the text, and behind its wrong turns what it said behind such a turn."""

    text: RecordedText
    time: VirtualTime
    costs: ReplayCosts
    candidates: int
    calibrator: Calibrator | None
    room: int = ROOM
    burst: int = 1
    outlook: Outlook | None = None
    _ran: set[int] = field(default_factory=set)
    _seen: int = 0

    def __post_init__(self) -> None:
        self._tokens = self.text.tokens.tolist()
        self._said = _lists(self.text.said)
        self._tails = _lists(self.text.tails)
        self._turns = [i for i in range(len(self.text)) if self._tails[i * TAIL][0][0] >= 0]

    def prefill(self, tokens: Sequence[int]) -> None:
        self._seen = len(tokens)

    def commit(self, path: Sequence[int], survivors: Mapping[int, int]) -> None:
        self._seen += len([node for node in path if node in self._ran])
        self._ran = {survivors[node] for node in self._ran if node in survivors}
        self.room = ROOM - len(self._ran)

    def propose(
        self,
        tree: Tree,
        nodes: Sequence[int],
        text: Sequence[int],
        steps: int = 1,
        going: Callable[[int], bool] = always,
    ) -> Drafted:
        backlog = max(0, tree.position - self._seen) if 0 in nodes else 0
        self._seen += backlog
        line = self.costs.overlapped_draft if self.time.overlapped else self.costs.serial_draft
        below, everywhere, done = list(nodes), list[int](), list[Step]()
        while len(done) < steps and (not done or going(0)):
            if done:
                first = len(tree)
                tree = tree.adopt_all((node, 0) for node in below)
                below = list(range(first, len(tree)))
            begin, self.time.now = self.time.now, self.time.now + line(len(below) + backlog)
            done.append(Step(begin, self.time.now, len(below) + backlog))
            backlog = 0
            found = note([self._said_at(tree, node) for node in below], self.calibrator)
            tree = tree.propose(dict(zip(below, found, strict=True)))
            everywhere += below
        self._ran.update(everywhere)
        self.room -= len(everywhere)
        return Drafted(tree, everywhere, done)

    def _said_at(self, tree: Tree, node: int) -> tuple[list[int], list[float], Signals]:
        tokens, word, entropy, margin = self._row(tree, node)
        count = min(self.candidates, len(tokens))
        signals = Signals(word[0], entropy, margin, depth := tree.nodes[node].depth, stands(self.outlook, depth))
        return tokens[:count], word[:count], signals

    def learn(self, tree: Tree, path: Sequence[int], next_token: int, outlook: Outlook | None) -> None:
        learn(self.calibrator, tree, path, next_token)
        self.outlook = outlook

    def _row(self, tree: Tree, node: int) -> Row:
        """What the draft said after this node; behind a wrong turn, its words with tokens that nothing equals."""
        at = tree.position - self.text.prompt_tokens + 1
        path = tree.path(node)
        wrong = next((i for i in range(1, len(path)) if not self._right(tree, path[i], at + i - 1)), None)
        position = at + len(path) - 1
        if wrong is None:
            return self._said[min(position, len(self._said) - 1)]
        turn, step = at + wrong - 1, len(path) - 1 - wrong
        if self._turns and (turn >= len(self.text) or self._tails[turn * TAIL][0][0] < 0):
            turn = self._turns[turn % len(self._turns)]  # not the draft's first choice there: another wrong turn's tail
        rows = self._tails if self._turns else self._said
        index = turn * TAIL + step % TAIL if self._turns else position % len(rows)
        tokens, word, entropy, margin = rows[index]
        return [-2 - i for i in range(len(tokens))], word, entropy, margin

    def _right(self, tree: Tree, node: int, at: int) -> bool:
        return at < len(self._tokens) and tree.nodes[node].token == self._tokens[at]


Row = tuple[list[int], list[float], float, float]


def _lists(said: Said) -> list[Row]:
    return list(
        zip(said.tokens.tolist(), said.agreement.tolist(), said.entropy.tolist(), said.margin.tolist(), strict=True)
    )


def replay(
    record: Record,
    policy: Policy,
    costs: ReplayCosts,
    overlap: bool | None,
    texts: Sequence[RecordedText] | None = None,
    hrad: HRad | None = None,
) -> list[Stats]:
    """Decode every recorded text again with another policy, in virtual seconds.

    overlap: True, False, or None to let measured costs choose, as `overlap="auto"` does. The calibrator and the
    measured costs are carried from text to text, as in a running engine.
    """
    measured, calibrator = Costs(), Calibrator()
    results = []
    for text in texts if texts is not None else record.texts:
        time = VirtualTime()
        drafter = None
        if policy.candidates > 0:
            drafter = ReplayDrafter(text, time, costs, policy.candidates, calibrator if policy.calibrated else None)
        decoder = Decoder(ReplayVerifier(text, time, costs, hrad), drafter, policy, measured, time, overlap)
        prompt = [0] * text.prompt_tokens
        count = 0
        for committed in decoder.rounds(prompt, len(text)):
            count += len(committed)
        decoder.stats.seconds = time.now
        decoder.stats.new_tokens = count
        results.append(decoder.stats)
    return results
