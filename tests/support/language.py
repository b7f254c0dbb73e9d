"""A made-up language: a target and a draft that are functions of the text, with lists of tokens as their caches.

They stand where models do (specbranch/stages.py), so that the loop, the tree and every policy run thousands of texts in
seconds, and they are strict: each compares what it is asked with what was committed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from random import Random
from typing import NamedTuple

from specbranch.constrained import Constrained
from specbranch.core.excerpt import Excerpt
from specbranch.core.messages import Drafted, Forecast, Step, Trunk, Verdict
from specbranch.core.suffix_index import SuffixIndex, continuations
from specbranch.core.tree import Proposals, Signals, Tree
from specbranch.replay.virtual_time import VirtualTime
from specbranch.stages import Ready, Retrieved, Retriever, ShouldContinue

CONTEXTS = 61
MANY = 1000  # tokens: no limit
CHUNK = 3  # tokens that are read at once, where not all are


def advance(state: int, token: int) -> int:
    """A hash of a text, from the hash of all but its last token."""
    return (state * 31 + token + 1) % (2**61 - 1)


def state_of(text: Sequence[int]) -> int:
    return reduce(advance, text, 7)


def whole_chunks(most: float, tokens: int) -> int:
    return tokens if most >= tokens else min(tokens, math.ceil(most / CHUNK) * CHUNK)


class Language:
    """Scores of the next token by a hash of the whole text, with Gumbel noise that target and draft share by position.

    The draft's scores are the target's and more noise: from none, so that it is always right, to so much that it
    guesses. Now and then it proposes everything but the target's token.
    """

    def __init__(self, seed: int) -> None:
        chance = Random(seed)
        self.vocabulary = chance.randint(8, 30)
        self.perverse = chance.random() < 0.05
        sharpness, doubt = chance.choice((0.5, 2.0, 5.0)), chance.choice((0.0, 0.1, 0.2, 0.3, 0.6, 6.0))
        self._noise = self._rows(chance, lambda: -math.log(-math.log(chance.random())))
        self._target = self._rows(chance, lambda: chance.gauss(0, sharpness))
        self._doubts = self._rows(chance, lambda: chance.gauss(0, doubt))
        self._said: dict[tuple[int, int, int, frozenset[int] | None], Proposals] = {}
        self._next: dict[tuple[int, int, frozenset[int] | None], int] = {}

    def _rows(self, chance: Random, draw: object) -> list[list[float]]:
        return [[draw() for _ in range(self.vocabulary)] for _ in range(CONTEXTS)]  # type: ignore[operator]

    def next(self, state: int, position: int, allowed: frozenset[int] | None = None) -> int:
        """The target's token behind a text, by its hash and the position of its last token. allowed: one of these."""
        key = state % CONTEXTS, position % CONTEXTS, allowed
        if (token := self._next.get(key)) is None:
            scores = [a + b for a, b in zip(self._target[key[0]], self._noise[key[1]], strict=True)]
            token = self._next[key] = max(sorted(allowed or range(self.vocabulary)), key=scores.__getitem__)
        return token

    def guess(self, state: int, position: int, candidates: int, allowed: frozenset[int] | None = None) -> Proposals:
        """The draft's candidates there; its confidence is a softmax of perturbed scores."""
        key = state % CONTEXTS, position % CONTEXTS, candidates, allowed
        if (said := self._said.get(key)) is None:
            columns = (self._target[key[0]], self._doubts[key[0]], self._noise[key[1]])
            scores = [sum(column) for column in zip(*columns, strict=True)]
            if self.perverse and (allowed is None or len(allowed) > 1):
                scores[self.next(state, position, allowed)] = -math.inf
            every = sorted(allowed or range(self.vocabulary), key=lambda token: -scores[token])
            tokens = every[: max(2, candidates)]
            weights = [math.exp(scores[token] - scores[tokens[0]]) for token in tokens]
            said = Proposals(tuple(tokens), tuple(weight / sum(weights) for weight in weights))
            self._said[key] = said
        return said

    def text(self, prompt: Sequence[int], count: int, grammar: Grammar | None = None) -> list[int]:
        """What autoregressive decoding says: the truth."""
        text, state = list(prompt), state_of(prompt)
        for _ in range(count):
            text.append(self.next(state, len(text) - 1, None if grammar is None else grammar.after(state)))
            state = advance(state, text[-1])
        return text[len(prompt) :]


class Grammar:
    """Which tokens may follow a text, by its hash: one, a handful, half of them, or all; the share of each by a seed.

    It is the matcher of one text, and strict: it is asked about what may stand, and about each place once. text: that
    it was told of.
    """

    def __init__(self, seed: int, vocabulary: int, prompt: Sequence[int]) -> None:
        chance = Random(seed)
        one, few = chance.choice((0.1, 0.3, 0.6)), chance.choice((0.0, 0.2))
        self.vocabulary, self.text, self.prompt = vocabulary, list(prompt), len(prompt)
        self._sets = [self._draw(chance, one, few) for _ in range(CONTEXTS)]
        self._says = chance.choice((0, 1, 9))  # of what must follow, tokens that it says at once
        self._asked: set[tuple[int, ...]] = set()

    def _draw(self, chance: Random, one: float, few: float) -> frozenset[int]:
        kind = chance.random()
        every = range(self.vocabulary)
        if kind < one:
            return frozenset(chance.sample(every, 1))
        if kind < one + few:
            return frozenset(chance.sample(every, chance.randint(2, 4)))
        return frozenset(chance.sample(every, self.vocabulary // 2) if kind < 0.8 else every)

    def after(self, state: int) -> frozenset[int]:
        return self._sets[state // CONTEXTS % CONTEXTS]

    def allowed(self, path: Sequence[int]) -> bytes:
        text = (*self.text, *path)
        assert text not in self._asked, "the grammar: asked twice about one place"
        self._asked.add(text)
        bits = sum(1 << token for token in self._after(path))
        return bits.to_bytes(4 * ((self.vocabulary + 31) // 32), "little")

    def _after(self, path: Sequence[int]) -> frozenset[int]:
        state = state_of(self.text)
        for token in path:
            assert token in self.after(state), "the grammar: asked about what cannot stand"
            state = advance(state, token)
        return self.after(state)

    def forced(self, path: Sequence[int]) -> list[int]:
        run: list[int] = []
        while len(run) < self._says and len(only := self._after([*path, *run])) == 1:
            run += only
        return run

    def accept(self, tokens: Sequence[int]) -> None:
        self._after(tokens)
        self.text += tokens

    @property
    def complete(self) -> bool:
        return True


class Trouble(Exception):
    """What one text has alone."""


def step_of(time: VirtualTime, cost: tuple[float, float], rows: int) -> Step:
    """A forward over so many rows, which the clock goes on by."""
    begin, time.now = time.now, time.now + cost[0] + cost[1] * rows
    return Step(begin, time.now, rows)


@dataclass
class LanguageTarget:
    """cost: seconds of a forward, and of each row more. read_cost: of a token of the prompt, whose last one is not in
    `prompt`. end: tokens of prompt and text, of which none may be verified that comes later. turn: the position at
    which it begins anew, which no round may pass. text: the cache. predictor: makes up forecasts, where there is one.
    forecast, trunk: the newest. fails: which trunk there is no verdict about; 0 for none. judged: trunks so far.
    grammar: what the text may be; constraint: who is asked about it."""

    language: Language
    time: VirtualTime
    cost: tuple[float, float]
    end: int
    most_rows: int
    turn: int = 0
    predictor: Random | None = None
    read_cost: float = 0.0
    prompt: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    forecast: Forecast | None = None
    verdict: Verdict | None = None
    trunk: Trunk | None = None
    fails: int = 0
    judged: int = 0
    grammar: Grammar | None = None
    constraint: Constrained | None = None

    @property
    def failed(self) -> bool:
        return 0 < self.fails <= self.judged

    def most_tokens(self, position: int) -> int:
        return self.turn - position if self.turn > position else MANY

    def begin(self, prompt: Sequence[int]) -> int:
        assert not self.text, "the target: a prompt behind a text"
        self.prompt = list(prompt[:-1])
        self._state = state_of([])
        return len(self.prompt)

    def read(self, most: float) -> int:
        count = whole_chunks(most, len(self.prompt) - len(self.text))
        assert count > 0, "the target: reads nothing"
        self.time.now += self.read_cost * count
        self.text = self.prompt[: len(self.text) + count]
        self._state = state_of(self.text)
        return count

    def verify(self, trunk: Trunk) -> Ready:
        path, token = self.judge(trunk)
        return Ready(self.say(path, token, step_of(self.time, self.cost, len(trunk))))

    def judge(self, trunk: Trunk) -> tuple[tuple[int, ...], int]:
        """The accepted places, and the token behind them."""
        assert not self.failed, "the target: goes on after an error"
        assert self.verdict is None, "the target: verified twice without a commit"
        assert len(self.text) >= len(self.prompt), "the target: decodes before it has read the prompt"
        assert len(trunk) <= self.most_rows, "the target: too many rows"
        assert trunk.position == len(self.text), "the target: the root stands elsewhere"
        assert trunk.parents[0] == -1, "the target: a root with a parent"
        assert all(0 <= parent < i for i, parent in enumerate(trunk.parents) if i), "the target: a parent is missing"
        places = list(zip(trunk.parents, trunk.tokens, strict=True))
        assert len(set(places)) == len(places), "the target: a token twice below one parent"
        assert max(trunk.positions) < self.end - 1, "the target: a token that cannot be committed"
        assert trunk.position >= self.turn or max(trunk.positions) < self.turn, "the target: a trunk beyond its turn"
        self.trunk, self.judged = trunk, self.judged + 1
        self._ask(trunk)
        if self.failed:
            raise Trouble
        state = advance(self._state, trunk.tokens[0])
        path: list[int] = []
        while True:
            token = self.language.next(state, trunk.position + len(path), self._after(state))
            last = path[-1] if path else 0
            if (last, token) not in places:
                break
            path.append(places.index((last, token)))
            state = advance(state, token)
        return tuple(path), token

    def _after(self, state: int) -> frozenset[int] | None:
        return None if self.grammar is None else self.grammar.after(state)

    def _ask(self, trunk: Trunk) -> None:
        """Every row has its mask, and every token may stand."""
        if self.grammar is None:
            return
        assert self.constraint is not None
        states, paths = list[int](), list[list[int]]()
        for token, parent in zip(trunk.tokens, trunk.parents, strict=True):
            above = self._state if parent < 0 else states[parent]
            assert parent < 0 or token in self.grammar.after(above), "the target: a token that cannot stand"
            states.append(advance(above, token))
            paths.append([] if parent < 0 else [*paths[parent], token])
            mask = self.constraint.allowed(paths[-1])
            found = {each for each in range(8 * len(mask)) if mask[each // 8] >> each % 8 & 1}
            assert found == self.grammar.after(states[-1]), "the target: another mask than the grammar's"

    def say(self, path: tuple[int, ...], token: int, step: Step) -> Verdict:
        """The verdict that took this step, perhaps with other texts'."""
        if self.predictor is not None:
            chances = [self.predictor.random() for _ in range(3)]
            self.forecast = Forecast(*(chance / sum(chances) for chance in chances))
        self.verdict = Verdict(path, token, step, self.forecast)
        return self.verdict

    def commit(self, path: Sequence[int]) -> None:
        assert self.verdict is not None, "the target: a commit without a verdict"
        assert self.trunk is not None
        assert tuple(path) == self.verdict.path, "the target: another path than the verdict's"
        rows = [self.trunk.tokens[place] for place in (0, *path)]
        self.text += rows
        self._state = reduce(advance, rows, self._state)
        self.verdict = None


class Row(NamedTuple):
    """A node in the draft's cache. path: the tokens from the tree's root to it. state: of the whole text up to it."""

    path: tuple[int, ...]
    state: int
    proposals: Proposals


class Lesson(NamedTuple):
    """What `learn` has to say after a commit."""

    position: int
    tokens: list[int]


@dataclass
class LanguageDrafter:
    """read_cost: seconds of a token that it reads. committed: the text that it was told of. prompt_tokens: of it.
    left_out: positions of it that it does not read; None before it reads. has_read: tokens. text: what its cache stands
    for. rows: of the tree, by node. capacities: rows at most, round by round; where there are few, the draft comes and
    goes. fails: which step cannot be sampled; 0 for none. ran: steps so far. unreadable: it fails when it is to
    read."""

    language: Language
    time: VirtualTime
    cost: tuple[float, float]
    end: int
    candidates: int
    capacities: Sequence[int]
    burst: int
    read_cost: float = 0.0
    prompt_tokens: int = 0
    left_out: range | None = None
    has_read: int = 0
    committed: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    rows: dict[int, Row] = field(default_factory=dict)
    lessons: list[Lesson] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    forecast: Forecast | None = None
    commits: int = 0
    fails: int = 0
    ran: int = 0
    unreadable: bool = False
    grammar: Grammar | None = None

    @property
    def failed(self) -> bool:
        return 0 < self.fails <= self.ran

    @property
    def room(self) -> int:
        return max(0, self.capacities[self.commits % len(self.capacities)] - len(self.rows))

    def begin(self, prompt: Sequence[int]) -> None:
        assert not self.committed, "the draft: a prompt behind a text"
        self.committed, self.prompt_tokens = list(prompt), len(prompt)

    def gap(self, excerpt: Excerpt, tokens: int) -> range:
        assert tokens == self.end, "the draft: another end of the text"
        return excerpt.gap(self.prompt_tokens)

    def unread(self, excerpt: Excerpt, tokens: int) -> int:
        return len(self.committed) - 1 - len(self.gap(excerpt, tokens)) - self.has_read

    def read(self, excerpt: Excerpt, tokens: int, most: float) -> int:
        assert not self.text, "the draft: reads twice"
        assert self.left_out in (None, self.gap(excerpt, tokens)), "the draft: reads something else"
        if self.unreadable:
            raise Trouble
        self.left_out = self.gap(excerpt, tokens)
        count = whole_chunks(most, self.unread(excerpt, tokens))
        self.has_read += count
        self.time.now += self.read_cost * count
        if self.unread(excerpt, tokens) == 0:
            self.text = self.committed[:-1]
            self._state = state_of(self.text)
        return count

    def propose(
        self, tree: Tree, nodes: Sequence[int], steps: int = 1, should_continue: ShouldContinue = lambda _: True
    ) -> Drafted:
        found: list[list[Proposals]] = []
        for row in self.run(tree, nodes, steps):
            found.append(row)
            self.steps.append(step_of(self.time, self.cost, len(nodes)))
            if len(found) == steps or not should_continue(0):
                break
        return Drafted(found, self.steps[-len(found) :])

    def run(self, tree: Tree, nodes: Sequence[int], steps: int) -> Iterator[list[Proposals]]:
        """What each step says, when it is asked for."""
        assert not self.failed, "the draft: goes on after an error"
        assert self.left_out is not None, "the draft: has not read the text"
        assert len(self.text) >= self.prompt_tokens - 1, "the draft: has not read the text"
        assert not self.lessons, "the draft: goes on before it has learned"
        assert tree.position == len(self.committed) - 1, "the draft: the root stands elsewhere"
        assert tree.token[0] == self.committed[-1], "the draft: another root"
        assert 0 < len(nodes) == len(set(nodes)), "the draft: a node twice in a step"
        assert len(nodes) * steps <= self.room, "the draft: no room"
        backlog = self.committed[len(self.text) : -1] if 0 in nodes else []
        self.text += backlog
        self._state = reduce(advance, backlog, self._state)
        new: list[tuple[int, int, tuple[int, ...], int]] = []  # node, token, path above, state above
        placed: dict[int, tuple[tuple[int, ...], int]] = {}  # path and state of those in this step
        for node in nodes:
            token, parent = tree.token[node], tree.parent[node]
            path: tuple[int, ...] = ()
            if parent < 0:
                assert len(self.text) == tree.position, "the draft: rows of the text are missing"
                state = self._state
            elif parent in placed:
                path, state = placed[parent]
            else:
                assert parent in self.rows, "the draft: a node without its parent's row"
                path, state = self.rows[parent].path, self.rows[parent].state
            new.append((node, token, path, state))
            placed[node] = (*path, token), advance(state, token)
        odds = [
            tree.retrieved_odds(node, self._guess(token, path, state).tokens[0]) for node, token, path, state in new
        ]
        for step in range(steps):
            if step:
                first = len(tree) + (step - 1) * len(nodes)
                above = [self.rows[node] for node, *_ in new]
                new = [(first + i, row.proposals.tokens[0], row.path, row.state) for i, row in enumerate(above)]
            self.ran += 1
            if self.failed:
                raise Trouble
            said = odds if step == 0 else [0.0] * len(new)
            yield [self._run(*row, retrieved) for row, retrieved in zip(new, said, strict=True)]

    def _run(self, node: int, token: int, above: tuple[int, ...], state: int, retrieved: float) -> Proposals:
        assert node not in self.rows, "the draft: runs twice over a node"
        assert len(self.committed) - 1 + len(above) < self.end - 1, "the draft: a token that cannot be committed"
        proposals = self._guess(token, above, state)
        first, second = (*proposals.confidence, 0.0)[:2]
        proposals = proposals._replace(signals=Signals(first, 1.0, first - second, len(above), 0.0, retrieved))
        self.rows[node] = Row((*above, token), advance(state, token), proposals)
        return proposals

    def _guess(self, token: int, above: tuple[int, ...], state: int) -> Proposals:
        """Behind a token."""
        now = advance(state, token)
        allowed = None if self.grammar is None else self.grammar.after(now)
        return self.language.guess(now, len(self.committed) - 1 + len(above), self.candidates, allowed)

    def commit(self, path: Sequence[int], survivors: Mapping[int, int], tokens: Sequence[int]) -> None:
        accepted = [self.rows[node] for node in path if node in self.rows]
        assert accepted == [self.rows[node] for node in path[: len(accepted)] if node in self.rows], "the draft: a gap"
        assert accepted or not self.rows, "the draft: the root is not committed"
        for row in accepted:
            self.text.append(row.path[-1])
            self._state = row.state
        kept = {survivors[node]: row for node, row in self.rows.items() if node in survivors}
        for row in kept.values():
            assert list(row.path[1 : len(tokens) + 1]) == list(tokens), "the draft: a survivor beside the text"
        self.rows = {node: row._replace(path=row.path[len(tokens) :]) for node, row in kept.items()}
        self.lessons.append(Lesson(len(self.committed) - 1, list(tokens)))
        self.committed += tokens
        self.commits += 1

    def learn(self, tree: Tree, path: Sequence[int], next_token: int, forecast: Forecast | None) -> None:
        assert self.lessons, "the draft: a lesson twice"
        lesson = self.lessons.pop(0)
        assert tree.position == lesson.position, "the draft: a lesson about another tree"
        assert [*tree.tokens(path[1:]), next_token] == lesson.tokens, "the draft: a lesson about other tokens"
        self.forecast = forecast


@dataclass
class ScriptedRetriever:
    """Finds what is right for some tokens and wrong for others: in copies of the text to come that have errors, and in
    the text itself.

    script: the text to come, prompt and all, and what would follow. vocabulary: of the errors. chance: what is
    drawn.
    """

    script: list[int]
    vocabulary: int
    chance: Random
    text: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        errors = self.chance.choice((0.02, 0.1, 0.3))
        copies = [
            [
                token if self.chance.random() >= errors else self.chance.randrange(self.vocabulary)
                for token in self.script
            ]
            for _ in range(self.chance.randint(1, 3))
        ]
        self._copies = [SuffixIndex(copy) for copy in copies]
        self._sure = self.chance.choice((0.3, 0.6, 0.9, 0.99))
        self._depth = self.chance.choice((3, 64))

    def begin(self, prompt: Sequence[int]) -> None:
        self.text = list(prompt)

    def find(self, drafted: Sequence[int], longest: int) -> Retrieved:
        """Where the text stands, if a copy has the same there. Siblings are together at most sure."""
        last = len(self.text) + len(drafted) - 1
        found = continuations(
            [SuffixIndex(self.text), *self._copies],
            [*self.text, *drafted],
            len(drafted),
            depth=min(self._depth, longest),
            occurrences=4,
            near=(self.chance.randint(1, len(self._copies)), last, last),
        )
        left = dict.fromkeys([-1, *range(len(found))], 1.0)  # of the chance, by parent
        chances = []
        for parent in found.parent:
            chances.append(self._sure * left[parent])
            left[parent] -= chances[-1]
        return Retrieved(found, chances)

    def commit(self, tokens: Sequence[int]) -> None:
        self.text += tokens

    def learn(self, tree: Tree, path: Sequence[int], next_token: int) -> None:
        pass


@dataclass
class WatchedRetriever:
    """Another one, told and asked what it should be. text: that it was told of. drafted: of the newest look-up; None
    where nothing was looked up since that was forgotten. fails: at which look-up or commit it cannot read what it looks
    into; 0 for none. ran: so far."""

    retriever: Retriever
    text: list[int] = field(default_factory=list)
    drafted: list[int] | None = None
    lessons: list[Lesson] = field(default_factory=list)
    fails: int = 0
    ran: int = 0

    def _run(self) -> None:
        assert not 0 < self.fails <= self.ran, "the retriever: goes on after an error"
        self.ran += 1
        if self.ran == self.fails:
            raise Trouble

    def begin(self, prompt: Sequence[int]) -> None:
        assert not self.text, "the retriever: a prompt behind a text"
        self.text = list(prompt)
        self.retriever.begin(prompt)

    def find(self, drafted: Sequence[int], longest: int) -> Retrieved:
        assert not self.lessons, "the retriever: looks up before it has learned"
        self.drafted = list(drafted)
        self._run()
        return self.retriever.find(drafted, longest)

    def commit(self, tokens: Sequence[int]) -> None:
        self._run()
        self.lessons.append(Lesson(len(self.text) - 1, list(tokens)))
        self.text += tokens
        self.retriever.commit(tokens)

    def learn(self, tree: Tree, path: Sequence[int], next_token: int) -> None:
        assert self.lessons, "the retriever: a lesson twice"
        lesson = self.lessons.pop(0)
        assert tree.position == lesson.position, "the retriever: a lesson about another tree"
        assert [*tree.tokens(path[1:]), next_token] == lesson.tokens, "the retriever: a lesson about other tokens"
        self.retriever.learn(tree, path, next_token)
