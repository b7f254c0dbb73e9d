"""Random trees, random verdicts: after every round both caches hold the committed text, and nothing else."""

import random
from collections.abc import Sequence

import pytest
import torch
from recording_device import RecordingDevice
from tiny import tiny_model
from transformers import DynamicCache

from specbranch.core.sampling import Sampling
from specbranch.core.tree import Tree
from specbranch.drafters.model import Drafter
from specbranch.loop import Decoder
from specbranch.policies.costs import Costs
from specbranch.policies.policy import Cut, Growth, Situation, nothing
from specbranch.runtime.cache import BranchCache
from specbranch.runtime.graphs.runner import CapturedRunner
from specbranch.runtime.model import CachedModel
from specbranch.runtime.runner import EagerRunner, Runner
from specbranch.runtime.verifier import Verdict, Verifier
from specbranch.runtime.workers import Threads

ROUNDS = 1000
TEXT = 40  # rounds before a new text is begun


class RandomPolicy:
    """Grows any node by any width and verifies any connected part of the tree."""

    name = "random"
    candidates = 3
    overlaps = False

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def before(self, tree: Tree, situation: Situation) -> Growth:
        fresh = [i for i, node in enumerate(tree.nodes) if node.proposals is None]
        if not fresh or len(tree) > 12 or self.chance.random() < 0.2:
            return nothing(tree)
        steps = self.chance.randint(1, 3)
        if 0 in fresh:
            return Growth(tree, [0], steps)
        return Growth(tree, sorted(self.chance.sample(fresh, self.chance.randint(1, min(3, len(fresh))))), steps)

    def cut(self, tree: Tree, situation: Situation) -> Cut:
        trunk = [0]
        for i in range(1, len(tree)):
            if tree.nodes[i].parent in trunk and self.chance.random() < 0.6:
                trunk.append(i)
        return Cut(tree, tuple(trunk), trunk[-1])

    def during(self, cut: Cut, tree: Tree, situation: Situation) -> Growth:
        return nothing(tree)

    def width(self, tree: Tree, node: int, branch_point: int | None) -> int:
        return self.chance.randint(1, 3)


class RandomVerifier(Verifier):
    """Runs the target, then accepts a random path and goes on with a random token, drafted or not."""

    chance: random.Random

    def verify(self, tree: Tree, trunk: Sequence[int]) -> Verdict:
        step = super().verify(tree, trunk).step
        path = [0]
        while (children := [i for i in tree.children(path[-1]) if i in trunk]) and self.chance.random() < 0.6:
            path.append(self.chance.choice(children))
        drafted = tree.tokens(tree.children(path[-1]))
        refused = set(tree.tokens(i for i in tree.children(path[-1]) if i in trunk))
        others = [token for token in drafted if token not in refused]
        if others and self.chance.random() < 0.7:
            return Verdict(tuple(path), self.chance.choice(others), step)
        return Verdict(tuple(path), self.chance.choice([t for t in range(32) if t not in refused]), step)


def assert_holds(cache: BranchCache, cached: CachedModel, text: list[int]) -> None:
    """The committed rows equal the K/V of a fresh forward over the text."""
    fresh = DynamicCache(config=cached.model.config)
    with torch.no_grad():
        cached.model(torch.tensor([text[: cache.length]]), past_key_values=fresh)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        for name in ("keys", "values"):
            held = getattr(ours, name)[:, :, : cache.length]
            torch.testing.assert_close(held, getattr(theirs, name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("captured", [False, True])
def test_caches_equal_a_fresh_forward_after_every_round(captured: bool) -> None:
    chance = random.Random(5)
    target = CachedModel(tiny_model(seed=1), "target")
    draft = CachedModel(tiny_model(seed=2, num_hidden_layers=1), "draft")
    target_runner: Runner = CapturedRunner(target, RecordingDevice(seed=1)) if captured else EagerRunner(target)
    draft_runner: Runner = CapturedRunner(draft, RecordingDevice(seed=2)) if captured else EagerRunner(draft)
    rounds = hits = moved = 0
    while rounds < ROUNDS:
        target.reset(200)
        draft.reset(200)
        verifier = RandomVerifier(target_runner, Sampling())
        verifier.chance = chance
        drafter = Drafter(draft_runner, Sampling(), 3, 32)
        decoder = Decoder(verifier, drafter, RandomPolicy(chance), Costs(), Threads(1), overlap=False)
        prompt = [chance.randrange(32) for _ in range(chance.randint(1, 9))]
        stepper = decoder.rounds(prompt, 150)
        for _ in range(TEXT):
            with target.attached(), draft.attached():
                if not next(stepper, None):
                    break
            rounds += 1
            for runner in (target_runner, draft_runner):
                runner.device.mark().wait()  # a commit may be enqueued
            assert target.cache.length == len(decoder.tokens) - 1
            assert_holds(target.cache, target, decoder.tokens)
            assert draft.cache.length <= len(decoder.tokens) - 1
            if draft.cache.length:
                assert_holds(draft.cache, draft, decoder.tokens)
            moved += bool(draft.cache.nodes)
        hits += decoder.stats.hits
    assert hits > ROUNDS // 10  # the drafted work did survive often
    assert moved > ROUNDS // 20  # with rows of its own in the draft's cache
