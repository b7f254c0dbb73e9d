"""Random trees and random verdicts, and what the caches must hold after them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from own_forward import own_cache

from specbranch.core.messages import Drafted, Trunk, Verdict
from specbranch.core.suffix_index import SuffixIndex, continuations
from specbranch.core.tree import Choice, Tree
from specbranch.decoding import Decoding
from specbranch.policies.policy import NOTHING, Expansion, InFlight, State, TrunkChoice
from specbranch.runtime.model import CachedModel
from specbranch.runtime.runner import Judged, PendingVerdict, PendingWalk
from specbranch.runtime.verifier import ModelVerifier
from specbranch.stages import Nodes, Pending, Retrieved


class RandomPolicy:
    """Grows any node by any width and verifies any connected part of the tree."""

    name = "random"
    candidates = 3
    overlaps = calibrated = thrifty = uses_forecast = may_retrieve = False

    def __init__(self, chance: random.Random, idle: float = 0.0) -> None:
        """idle: share of rounds from which on it drafts nothing for some tokens."""
        self.chance, self.idle = chance, idle
        self.until = 0

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        if len(tree) == 1 and self.chance.random() < self.idle:
            self.until = tree.position + self.chance.randint(4, 24)
        fresh = [node for node, proposals in enumerate(tree.proposals) if proposals is None]
        if not fresh or len(tree) > 12 or tree.position < self.until or self.chance.random() < 0.2:
            return NOTHING
        steps = self.chance.randint(1, 3)
        if 0 in fresh and (len(tree) == 1 or self.chance.random() < 0.5):
            return Expansion([Choice(0)], steps)
        chosen = sorted(self.chance.sample(fresh, self.chance.randint(1, min(3, len(fresh)))))
        return Expansion([Choice(node) for node in chosen], steps)

    def choose_trunk(self, tree: Tree, state: State) -> TrunkChoice:
        trunk = [0]
        for node in range(1, len(tree)):
            if tree.parent[node] in trunk and self.chance.random() < 0.6:
                trunk.append(node)
        return TrunkChoice([Choice(node) for node in trunk], len(trunk) - 1)

    def draft_during(self, tree: Tree, flight: InFlight, state: State) -> Expansion:
        return NOTHING

    def width(self, tree: Tree, node: int, flight: InFlight | None) -> int:
        return self.chance.randint(1, 3)


class RandomRetriever:
    """Finds little, and says that all of it may well be. Nothing is learned."""

    def begin(self, prompt: Sequence[int]) -> None:
        self.text = list(prompt)

    def find(self, drafted: Sequence[int], longest: int) -> Retrieved:
        text = SuffixIndex(self.text)
        found = continuations(
            [text], [*self.text, *drafted], len(drafted), occurrences=2, depth=min(4, longest), most_nodes=5
        )
        return Retrieved(found, [0.45] * len(found))

    def commit(self, tokens: Sequence[int]) -> None:
        self.text += tokens

    def learn(self, tree: Tree, path: Sequence[int], next_token: int) -> None:
        pass


class RandomVerifier(ModelVerifier):
    """Runs the target, then accepts a random path and goes on with a random token, drafted or not."""

    chance: random.Random
    decoding: "SpyDecoding"
    trunk: Trunk

    def place(self, trunk: Trunk) -> Judged:
        self.trunk = trunk
        return super().place(trunk)

    def pending(self, pending: PendingVerdict | PendingWalk) -> Pending:
        return RandomVerdict(self, super().pending(pending))

    def choose(self) -> tuple[tuple[int, ...], int]:
        """A path of the trunk, and a token behind it."""
        trunk, path = self.trunk, list[int]()

        def below() -> list[int]:
            last = path[-1] if path else 0
            return [place for place, parent in enumerate(trunk.parents) if parent == last]

        while (children := below()) and self.chance.random() < 0.6:
            path.append(self.chance.choice(children))
        refused = {trunk.tokens[place] for place in below()}
        tree, nodes = self.decoding.tree, self.decoding.nodes
        drafted = tree.tokens(tree.children[nodes[path[-1] if path else 0]])
        others = [token for token in drafted if token not in refused]
        if not others or self.chance.random() >= 0.7:
            others = [token for token in range(32) if token not in refused]
        return tuple(path), self.chance.choice(others)


@dataclass
class RandomVerdict:
    verifier: RandomVerifier
    pending: Pending

    def done(self) -> bool:
        return self.pending.done()

    def result(self) -> Verdict:
        step = self.pending.result().step
        path, next_token = self.verifier.choose()
        return Verdict(path, next_token, step)


class SpyDecoding(Decoding):
    """Shows the round's trunk. steps_together: of each draft step, whether it held a node and its parent. related:
    proposals at nodes where something was retrieved."""

    nodes: tuple[int, ...]
    steps_together: list[bool] | None = None
    related = 0

    def take(self, expansion: Expansion) -> Nodes:
        drafter, tree, nodes = super().take(expansion)
        if self.steps_together is not None:
            self.steps_together.append(any(tree.parent[node] in nodes for node in nodes))
        return drafter, tree, nodes

    def grow(self, nodes: Sequence[int], drafted: Drafted, flight: InFlight | None) -> None:
        for step, each in enumerate(drafted.proposals):
            for node, (tokens, _, signals) in zip(nodes, each, strict=True):
                assert signals is not None
                assert signals.retrieved == (0.0 if step else self.tree.retrieved_odds(node, tokens[0]))
                self.related += signals.retrieved != 0
        super().grow(nodes, drafted, flight)

    def choose_trunk(self, state: State) -> InFlight:
        flight = super().choose_trunk(state)
        self.nodes = flight.nodes
        return flight


def assert_holds(cached: CachedModel, text: Sequence[int], atol: float = 1e-4) -> None:
    """The committed rows equal the K/V of a fresh forward over the text, without what it leaves out."""
    cache = cached.cache
    places = [place for place in range(len(text)) if place not in cached.gap][: cache.length]
    fresh = own_cache(cached.model, [text[place] for place in places], places, cached.cache_argument)
    rows = slice(cache.start, cache.start + cache.length)
    for ours, theirs in zip(cache.buffers.branch_layers, fresh.layers, strict=True):
        for name in ("keys", "values"):
            held = getattr(ours, name)[:, :, rows]
            torch.testing.assert_close(held, getattr(theirs, name), rtol=0, atol=atol)
