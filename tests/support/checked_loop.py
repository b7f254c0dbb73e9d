"""Texts of a made-up language through the decoding loop, with everything checked after every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from random import Random
from typing import Any, cast

import pytest
from language import (
    Grammar,
    Language,
    LanguageDrafter,
    LanguageTarget,
    ScriptedRetriever,
    WatchedRetriever,
    state_of,
)
from plain_calibration import PlainCalibrator

from specbranch import decoding
from specbranch.constrained import Constrained
from specbranch.core.excerpt import ALL, Excerpt
from specbranch.core.messages import Drafted, Verdict
from specbranch.core.stats import CAUSES, Stats
from specbranch.core.tree import Tree
from specbranch.decoding import LEAST_REACH, Decoding
from specbranch.drafters.retrieval import RetrievalDrafter
from specbranch.loop import DecodingLoop
from specbranch.policies.calibration import Calibrator
from specbranch.policies.costs import Costs
from specbranch.policies.methods import make_policy, options_of
from specbranch.policies.policy import Expansion, InFlight, Policy, State
from specbranch.policies.reading import AtOnce, Lengths, WhenItPays
from specbranch.replay.virtual_time import VirtualTime

LANGUAGES = 20
RETRIEVALS = ("", "", "", "beside", "alone", "scripted beside", "scripted beside", "scripted alone")
language = cache(Language)


class CheckedDecoding(Decoding):
    """After every round, both caches hold the committed text and what lives on, and the round's counts are right.

    text: the prompt and the committed tokens. grown: nodes that were added to a tree, of retrieved ones those that a
    model ran over. left: such nodes that lived on at the newest commit, the root among them. grafted: every retrieved
    token, as the text that ends with it; forced, few: those that a grammar added. unlikely: the first nodes of a tree
    whose root had a reach of 0, of which nothing follows for those below. certain: tokens committed without a forward.
    """

    verifier: LanguageTarget
    drafter: LanguageDrafter | None
    retriever: WatchedRetriever | None

    def begin(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        self.text, self.grown, self.left, self.unlikely, self.certain = list(prompt), 0, 1, 0, 0
        self.grafted: set[tuple[int, ...]] = set()
        self.forced: set[tuple[int, ...]] = set()
        self.few: set[tuple[int, ...]] = set()
        super().begin(prompt, max_new_tokens)

    def state(self, overlapped: bool) -> State:
        state = super().state(overlapped)
        assert state.forecast == self.verifier.forecast, "another forecast than the newest verdict's"
        return state

    def choose_trunk(self, state: State) -> InFlight:
        assert self.drafter is None or not self.drafter.failed, "a trunk of a text that has an error"
        flight = super().choose_trunk(state)
        check_tree(self.tree, self.unlikely)
        return flight

    def retrieve(self, flight: InFlight | None = None) -> None:
        tree, size = self.tree, len(self.tree)
        best = best_tokens(tree)
        if self.retriever is not None:
            self.retriever.drafted = None
        super().retrieve(flight)
        drafted = None if self.retriever is None else self.retriever.drafted
        assert drafted in (None, best), "the best path is not what goes on"
        for node in range(size, len(tree)):
            assert drafted is not None, "retrieved without a look-up"
            path = tree.tokens(tree.path(node)[1:])
            assert path[: len(drafted)] == drafted, "retrieved behind another text"
            assert tree.depth[node] < self.remaining, "a retrieved token that cannot be committed"
            if len(path) > len(drafted) and (*self.text, *path) not in self.forced:
                assert tree.reach[node] >= LEAST_REACH, "retrieved, and hardly likely"
                self.grafted.add((*self.text, *path))
        assert len(tree) == size or self.was_free(tree, len(tree) - 1), "a candidate is drafted for nothing behind it"

    def force(self, nodes: Sequence[int]) -> None:
        tree, size = self.tree, len(self.tree)
        super().force(nodes)
        for node in range(size, len(tree)):
            self.check_forced(node)
            self.forced.add(self.text_of(tree, node))

    def check_forced(self, node: int) -> None:
        tree, grammar = self.tree, self.verifier.grammar
        assert grammar is not None, "forced, and there is no grammar"
        assert grammar.after(state_of(self.text_of(tree, tree.parent[node]))) == {tree.token[node]}, "forced, and free"
        assert tree.depth[node] < self.remaining, "a forced token that cannot be committed"

    def _offer_few(self) -> None:
        tree, size = self.tree, len(self.tree)
        super()._offer_few()
        for node in range(size, len(tree)):
            if (text := self.text_of(tree, node)) not in self.forced:
                assert tree.reach[node] >= LEAST_REACH, "offered, and hardly likely"
                assert tree.depth[node] < self.remaining, "an offered token that cannot be committed"
                self.few.add(text)

    def text_of(self, tree: Tree, node: int) -> tuple[int, ...]:
        return (*self.text, *tree.tokens(tree.path(node)[1:]))

    def was_free(self, tree: Tree, node: int) -> bool:
        """Whether no draft proposed it."""
        return self.text_of(tree, node) in self.grafted | self.forced | self.few

    def _readable(self, wanted: Expansion) -> Expansion:
        assert len({*wanted.choices}) == len(wanted.choices), "a place is wanted twice"
        return super()._readable(wanted)

    def grow(self, nodes: Sequence[int], drafted: Drafted, flight: InFlight | None) -> None:
        super().grow(nodes, drafted, flight)
        check_tree(self.tree, self.unlikely)

    def was_grafted(self, tree: Tree, node: int) -> bool:
        return self.text_of(tree, node) in self.grafted

    def paid(self, tree: Tree, more: Sequence[int]) -> set[int]:
        """The nodes that cost something: those that were drafted, and those that a model ran over. more: such."""
        rows = {} if self.drafter is None else self.drafter.rows
        return {node for node in range(len(tree)) if node in rows or node in more or not self.was_free(tree, node)}

    def commit(self, flight: InFlight, verdict: Verdict) -> list[int]:
        tree = self.tree
        hit = next_node(tree, [*(tree.token[flight.nodes[place]] for place in verdict.path), verdict.next_token])
        paid = self.paid(tree, [*flight.nodes, *([] if hit is None else [hit])])
        forced = {node for node in range(1, len(tree)) if self._forcing and self.is_forced(tree, node)}
        grafted = {node for node in range(len(tree)) if self.was_grafted(tree, node)} - forced
        free = {node for node in range(len(tree)) if self.was_free(tree, node)}
        self.grown += len(paid) - self.left
        everything, left = super().commit(flight, verdict), self.tree
        committed = everything[: len(verdict.path) + 1]
        self.text += committed
        self.check_certain_end(everything[len(committed) :])
        self.left = len(self.paid(left, [0]))
        self.unlikely = len(left) if hit is not None and (tree.reach[hit] == 0 or self.unlikely) else 0
        assert self.verifier.verdict is None, "the target: no commit"
        assert self.verifier.text == self.text[:-1], "the target's cache is not the text"
        assert (left.token[0], left.position) == (self.text[-1], len(self.text) - 1), "the root is not the last token"
        if self.drafter is not None:
            check_draft(self.drafter, left, self.text)
        if self.retriever is not None:
            assert self.retriever.text == self.text, "the retriever was not told of the text"
        self._check_counts(tree, verdict, committed, paid)
        taken = [flight.nodes[place] for place in verdict.path]
        round = self.stats.log[-1]
        assert round.retrieved == len(grafted.intersection(flight.nodes[1:])), "retrieved tokens are miscounted"
        assert round.retrieved_accepted == len(grafted.intersection(taken)), "retrieved tokens are miscounted"
        assert round.forced == len(forced.intersection(flight.nodes[1:])), "forced tokens are miscounted"
        assert round.forced_accepted == len(forced.intersection(taken)), "forced tokens are miscounted"
        if not self.drafting:
            assert free.issuperset(flight.nodes[1:]), "a token verified that nobody drafted"
        return everything

    def is_forced(self, tree: Tree, node: int) -> bool:
        grammar = self.verifier.grammar
        assert grammar is not None
        return len(grammar.after(state_of(self.text_of(tree, tree.parent[node])))) == 1

    def check_certain_end(self, rest: list[int]) -> None:
        """Tokens that no forward has seen: nothing else may follow, and with them the text is over."""
        self.certain = len(rest)
        if not rest:
            return
        assert self.remaining == 0, "committed without a forward, and the text is not over"
        text = list(self.text)
        for token in rest:
            assert self.verifier.grammar is not None
            assert self.verifier.grammar.after(state_of(text)) == {token}, "committed without a forward, and free"
            text.append(token)

    def _check_counts(self, tree: Tree, verdict: Verdict, committed: list[int], paid: set[int]) -> None:
        round = self.stats.log[-1]
        path = [0]
        for token in committed:
            below = [node for node in tree.children[path[-1]] if tree.token[node] == token]
            assert len(below) <= 1, "a token twice below one parent"
            path += below
            if not below:
                break
        hit = len(path) == len(committed) + 1
        assert round.hit == hit, "a hit is not counted"
        assert self.verifier.trunk is not None
        assert round.verified == len(self.verifier.trunk) - 1, "verified tokens are miscounted"
        assert round.accepted == len(verdict.path) == len(committed) - 1, "accepted tokens are miscounted"
        lost = len(paid) - len(committed) - (self.left if hit else 0)
        assert round.wasted == lost, "wasted tokens are miscounted"
        best_path = tree.best_path()[1:]
        best = tree.tokens(best_path)
        right = next((i for i, pair in enumerate(zip(best, committed, strict=False)) if pair[0] != pair[1]), None)
        right = min(len(best), len(committed)) if right is None else right
        behind = [] if right == len(committed) else best_path[right:]
        assert round.rolled_back == len(paid.intersection(behind)), "rollback is miscounted"
        if not self.drafting:
            assert not round.draft, "a draft step before the draft has read"
            assert not round.overlapped, "overlapped with a draft that has not read"
        assert round.rejected <= 1, "more than one token rejected by a verdict"


def best_tokens(tree: Tree) -> list[int]:
    """The likeliest token at every place, whether it is a node or the draft's first candidate; of equal ones the
    node that came first."""
    node, tokens = 0, list[int]()
    while True:
        children, proposals = tree.children[node], tree.proposals[node]
        best = max(children, key=lambda child: tree.reach[child], default=None)
        if proposals is not None and proposals.tokens[0] not in tree.tokens(children):
            reach = tree.reach[node] * proposals.confidence[0]
            if best is None or reach > tree.reach[best]:
                return [*tokens, proposals.tokens[0]]
        if best is None:
            return tokens
        node = best
        tokens.append(tree.token[node])


def next_node(tree: Tree, tokens: Sequence[int]) -> int | None:
    """The node that a path of tokens ends at."""
    node: int | None = 0
    for token in tokens:
        node = None if node is None else tree.child(node, token)
    return node


def check_tree(tree: Tree, first: int) -> None:
    """No token twice below a parent, and from a first node on what the draft says of retrieved ones is their reach."""
    for node, children in enumerate(tree.children):
        tokens, proposals = tree.tokens(children), tree.proposals[node]
        assert len(set(tokens)) == len(tokens), "a token twice below one parent"
        if proposals is None:
            continue
        said = dict(zip(proposals.tokens, proposals.confidence, strict=True))
        for child, token in zip(children, tokens, strict=True):
            if child >= first and tree.retrieved(child) and token in said:
                expected = tree.reach[node] * said[token]
                assert tree.reach[child] == pytest.approx(expected), "retrieved, and the draft is not believed"


def check_draft(draft: LanguageDrafter, tree: Tree, text: list[int]) -> None:
    assert draft.committed == text, "the draft was not told of the text"
    assert draft.text == text[: len(draft.text)], "the draft's cache is not the text"
    assert len(draft.text) < len(text), "the draft's cache is longer than the text"
    for node, row in draft.rows.items():
        assert node < len(tree), "a row in the draft's cache of no node"
        assert list(row.path) == tree.tokens(tree.path(node)), "a row in the draft's cache is another node's"
        assert row.proposals == tree.proposals[node], "proposals of another node"
    drafted = [node for node, proposals in enumerate(tree.proposals) if proposals is not None]
    assert drafted == sorted(draft.rows), "proposals without a row, or a row without proposals"


@dataclass(frozen=True)
class Case:
    """One text, drawn at random from a seed. left_after: rounds after which nobody wants more of it. turn: where the
    target begins anew. context: what of the prompt the draft reads at once; None where costs decide. read_costs:
    seconds of a token that the target reads, and the draft. retrieval: "beside" a draft, or "alone" without one; with
    "scripted" in front of it another retriever than the real one. grammar: that the text is under; 0 for none."""

    seed: int
    method: str
    overlap: bool | None
    options: dict[str, Any] = field(default_factory=dict)
    language: int = 0
    prompt: tuple[int, ...] = (1,)
    new_tokens: int = 12
    most_rows: int = 240
    capacities: tuple[int, ...] = (240,)
    burst: int = 1
    target_cost: tuple[float, float] = (1.0, 0.0)
    draft_cost: tuple[float, float] = (0.1, 0.0)
    forecasts: bool = False
    left_after: int | None = None
    turn: int = 0
    context: Excerpt | None = ALL
    read_costs: tuple[float, float] = (0.0, 0.0)
    retrieval: str = ""
    grammar: int = 0

    @staticmethod
    def draw(seed: int, method: str, overlap: bool | None) -> Case:
        chance = Random(f"{method} {overlap} {seed}")
        draft = chance.choice((0.01, 0.03, 0.1, 0.3, 1.1))
        return Case(
            seed,
            method,
            overlap,
            draw_options(chance, method),
            language=chance.randrange(LANGUAGES),
            prompt=tuple(chance.randrange(8) for _ in range(chance.randint(1, 6))),
            new_tokens=chance.choice((1, 2, 3, *range(4, 40))),
            most_rows=chance.choice((1, 4, 240, 240, 240, 240)),
            capacities=chance.choice([(240,), (240,), (240,), (240,), (8,), (0, 20), (3, 0, 0, 40)]),
            burst=chance.choice((1, 1, 2, 16)),
            target_cost=(1.0, chance.choice((0.0, 0.01, 0.1))),
            draft_cost=(draft, draft * chance.choice((0.0, 0.01, 0.1))),
            forecasts=chance.random() < 0.2,
            left_after=chance.randint(0, 4) if chance.random() < 0.1 else None,
            turn=chance.choice((0, 0, 0, chance.randint(1, 30))),
            context=chance.choice((ALL, None, None, Excerpt(1, 1), Excerpt(0, 2), Excerpt(3, 0))),
            read_costs=chance.choice(((0.0, 0.0), (0.05, 0.02), (0.3, 0.2), (0.3, 3.0))),
            retrieval=chance.choice(RETRIEVALS) if make_policy(method, {}).may_retrieve else "",
            grammar=chance.choice((0, 0, chance.randint(1, 99))),
        )

    def policy(self) -> Policy:
        return make_policy(self.method, dict(self.options))

    def decoding(self, costs: Costs, time: VirtualTime) -> CheckedDecoding:
        """costs: measured by the texts before."""
        spoken, policy = language(self.language), self.policy()
        end = len(self.prompt) + self.new_tokens
        predictor = Random(self.seed) if self.forecasts else None
        read_target, read_draft = self.read_costs
        target = LanguageTarget(spoken, time, self.target_cost, end, self.most_rows, self.turn, predictor, read_target)
        draft = None
        if policy.candidates and not self.retrieval.endswith("alone"):
            more = (end, policy.candidates, self.capacities, self.burst)
            draft = LanguageDrafter(spoken, time, self.draft_cost, *more, read_draft)
        reading = WhenItPays(Lengths()) if self.context is None else AtOnce(self.context)
        constraint = None
        if self.grammar:
            target.grammar = self.made_up_grammar()
            constraint = target.constraint = Constrained(target.grammar, spoken.vocabulary, frozenset())
            if draft is not None:
                draft.grammar = target.grammar
        retriever = self.retriever()
        return CheckedDecoding(target, draft, policy, costs, time, self.overlap, reading, retriever, constraint)

    def made_up_grammar(self) -> Grammar:
        return Grammar(self.grammar, language(self.language).vocabulary, self.prompt)

    @cached_property
    def truth(self) -> list[int]:
        grammar = self.made_up_grammar() if self.grammar else None
        return language(self.language).text(self.prompt, self.new_tokens + 20, grammar)  # more than may be committed

    def retriever(self) -> WatchedRetriever | None:
        if not self.retrieval:
            return None
        if not self.retrieval.startswith("scripted"):
            compiled = vars(decoding)["Tree"] is Tree  # else its definition decodes
            return WatchedRetriever(RetrievalDrafter(Calibrator() if compiled else cast(Calibrator, PlainCalibrator())))
        vocabulary = language(self.language).vocabulary
        return WatchedRetriever(ScriptedRetriever([*self.prompt, *self.truth], vocabulary, Random(self.seed)))

    def run(self, costs: Costs) -> Stats:
        """Decode it and check."""
        time = VirtualTime()
        text, tokens = self.decoding(costs, time), list[int]()
        rounds = DecodingLoop(time).rounds(text, self.prompt, self.new_tokens)
        for committed in rounds:
            self.check_round(tokens, committed)
            if self.left_after is not None and len(text.stats.log) > self.left_after:
                break
        rounds.close()
        self.check_end(text, tokens)
        self.check_reading(text)
        return text.stats

    def check_round(self, tokens: list[int], committed: list[int]) -> None:
        """Add what a round committed to the tokens."""
        assert committed, "a round that commits nothing"
        tokens += committed
        expected = self.truth[: self.new_tokens]
        assert tokens == expected[: len(tokens)], "another text than the target's"
        assert len(tokens) <= self.new_tokens, "more tokens than asked for"

    def check_end(self, text: CheckedDecoding, tokens: list[int]) -> None:
        """What a text says of itself that is over."""
        stats, draft = text.stats, text.drafter
        assert self.left_after is not None or len(tokens) == self.new_tokens, "the text ends too early"
        assert stats.prompt_tokens == len(self.prompt), "prompt tokens are miscounted"
        assert stats.new_tokens == sum(round.tokens for round in stats.log) == len(tokens), "new tokens are miscounted"
        assert stats.rounds == stats.target_forwards == len(stats.log), "rounds are miscounted"
        assert stats.accepted + stats.rounds + text.certain == len(tokens), "accepted tokens do not add up"
        assert stats.drafted == text.grown, "drafted tokens are miscounted"
        assert stats.left_over == text.left - 1, "tokens left over are miscounted"
        assert sum(getattr(stats, cause) for cause in CAUSES) == stats.wasted, "causes of waste do not add up"
        assert stats.hits == sum(round.hit for round in stats.log), "hits do not add up"
        if text.retriever is not None:
            assert not text.retriever.lessons, "the retriever: a verdict that it never learned"
        assert stats.retrieved == sum(round.retrieved for round in stats.log), "retrieved tokens do not add up"
        assert stats.retrieved_accepted <= min(stats.retrieved, stats.accepted), "retrieved tokens do not add up"
        if draft is not None:
            read = 0 if draft.left_out is None else len(self.prompt) - len(draft.left_out)
            assert stats.draft_context_tokens == read, "tokens that the draft read are miscounted"
            assert stats.draft_prefill_seconds <= stats.prefill_seconds, "a prefill longer than both"
            assert not draft.lessons, "the draft: a verdict that it never learned"
            assert [step for round in stats.log for step in round.draft] == draft.steps, "draft steps are miscounted"
            assert stats.draft_forwards == len(draft.steps), "draft forwards are miscounted"

    def check_reading(self, text: CheckedDecoding) -> None:
        """Whether the draft read as it was told, and went on beside the target, where all is read before a round."""
        stats = text.stats
        if text.drafter is not None:
            assert text.drafter.left_out is not None or self.context is None, "the draft was told to read and did not"
        assert self.overlap is not False or not stats.overlap, "overlapped, and was told not to"
        if self.overlap and text.drafter is not None and text.policy.overlaps:
            unread = sum(not round.overlapped for round in stats.log)
            assert unread == 0 or self.context is None, "in turn, and was told to overlap"


def draw_options(chance: Random, method: str) -> dict[str, Any]:
    """Half of a method's options, with any values within the ranges that they declare; counts are small ones."""
    drawn: dict[str, Any] = {}
    for name, declared in options_of(method).items():
        if chance.random() < 0.5:
            continue
        least, most, choices = (declared.metadata[key] for key in ("least", "most", "choices"))
        if choices:
            drawn[name] = chance.choice(choices)
        elif isinstance(declared.default, bool):
            drawn[name] = chance.random() < 0.5
        elif isinstance(declared.default, int):
            drawn[name] = chance.randint(int(least), int(least) + chance.choice((1, 4, 12)))
        else:
            drawn[name] = chance.choice((least, most, chance.uniform(least, most)))
    return drawn
