"""Texts of a made-up language through the decoding loop, with everything checked after every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from language import Language, LanguageDrafter, LanguageTarget

from specbranch.core.excerpt import ALL, Excerpt
from specbranch.core.messages import Verdict
from specbranch.core.stats import CAUSES, Stats
from specbranch.core.tree import Tree
from specbranch.decoding import Decoding
from specbranch.loop import DecodingLoop
from specbranch.policies.costs import Costs
from specbranch.policies.methods import make_policy, options_of
from specbranch.policies.policy import InFlight, Policy, State
from specbranch.policies.reading import AtOnce, Lengths, WhenItPays
from specbranch.replay.virtual_time import VirtualTime

LANGUAGES = 20
language = cache(Language)


class CheckedDecoding(Decoding):
    """After every round, both caches hold the committed text and what lives on, and the round's counts are right.

    text: the prompt and the committed tokens. grown: nodes that were added to a tree. left: nodes that lived on at the
    newest commit, the root among them.
    """

    verifier: LanguageTarget
    drafter: LanguageDrafter | None

    def begin(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        self.text, self.grown, self.left = list(prompt), 0, 1
        super().begin(prompt, max_new_tokens)

    def state(self, overlapped: bool) -> State:
        state = super().state(overlapped)
        assert state.forecast == self.verifier.forecast, "another forecast than the newest verdict's"
        return state

    def choose_trunk(self, state: State) -> InFlight:
        assert self.drafter is None or not self.drafter.failed, "a trunk of a text that has an error"
        return super().choose_trunk(state)

    def commit(self, flight: InFlight, verdict: Verdict) -> list[int]:
        tree = self.tree
        self.grown += len(tree) - self.left
        committed, left = super().commit(flight, verdict), self.tree
        self.text += committed
        self.left = len(left)
        assert self.verifier.verdict is None, "the target: no commit"
        assert self.verifier.text == self.text[:-1], "the target's cache is not the text"
        assert (left.token[0], left.position) == (self.text[-1], len(self.text) - 1), "the root is not the last token"
        if self.drafter is not None:
            check_draft(self.drafter, left, self.text)
        self._check_counts(tree, verdict, committed, left)
        return committed

    def _check_counts(self, tree: Tree, verdict: Verdict, committed: list[int], left: Tree) -> None:
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
        lost = len(tree) - len(committed) - (len(left) if hit else 0)
        assert round.wasted == lost, "wasted tokens are miscounted"
        best = tree.tokens(tree.best_path()[1:])
        right = next((i for i, pair in enumerate(zip(best, committed, strict=False)) if pair[0] != pair[1]), None)
        right = min(len(best), len(committed)) if right is None else right
        assert round.rolled_back == (0 if right == len(committed) else len(best) - right), "rollback is miscounted"
        if not self.drafting:
            assert round.verified == 0, "a token verified that nobody drafted"
            assert not round.draft, "a draft step before the draft has read"
            assert not round.overlapped, "overlapped with a draft that has not read"
        assert round.rejected <= 1, "more than one token rejected by a verdict"


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
    seconds of a token that the target reads, and the draft."""

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
        if policy.candidates:
            more = (end, policy.candidates, self.capacities, self.burst)
            draft = LanguageDrafter(spoken, time, self.draft_cost, *more, read_draft)
        reading = WhenItPays(Lengths()) if self.context is None else AtOnce(self.context)
        return CheckedDecoding(target, draft, policy, costs, time, self.overlap, reading)

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
        expected = language(self.language).text(self.prompt, self.new_tokens)
        assert tokens == expected[: len(tokens)], "another text than the target's"
        assert len(tokens) <= self.new_tokens, "more tokens than asked for"

    def check_end(self, text: CheckedDecoding, tokens: list[int]) -> None:
        """What a text says of itself that is over."""
        stats, draft = text.stats, text.drafter
        assert self.left_after is not None or len(tokens) == self.new_tokens, "the text ends too early"
        assert stats.prompt_tokens == len(self.prompt), "prompt tokens are miscounted"
        assert stats.new_tokens == sum(round.tokens for round in stats.log) == len(tokens), "new tokens are miscounted"
        assert stats.rounds == stats.target_forwards == len(stats.log), "rounds are miscounted"
        assert stats.accepted + stats.rounds == len(tokens), "accepted tokens do not add up"
        assert stats.drafted == text.grown, "drafted tokens are miscounted"
        assert stats.left_over == text.left - 1, "tokens left over are miscounted"
        assert sum(getattr(stats, cause) for cause in CAUSES) == stats.wasted, "causes of waste do not add up"
        assert stats.hits == sum(round.hit for round in stats.log), "hits do not add up"
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
