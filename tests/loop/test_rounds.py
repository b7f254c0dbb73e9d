"""Random trees, random verdicts: after every round both caches hold the committed text, and nothing else."""

import random

import pytest
import torch
from recording_device import RecordingDevice
from tiny import tiny_model
from transformers import DynamicCache

from specbranch.core.messages import Trunk, Verdict
from specbranch.core.sampling import Sampling
from specbranch.core.tree import Choice, Tree
from specbranch.decoding import Decoding
from specbranch.drafters.model import ModelDrafter
from specbranch.loop import DecodingLoop
from specbranch.policies.costs import Costs
from specbranch.policies.policy import NOTHING, Expansion, InFlight, State, TrunkChoice
from specbranch.runtime.cache import BranchCache
from specbranch.runtime.graphs.runner import CapturedRunner
from specbranch.runtime.model import CachedModel
from specbranch.runtime.runner import EagerRunner, Runner
from specbranch.runtime.verifier import ModelVerifier
from specbranch.runtime.workers import Threads
from specbranch.stages import Ready

ROUNDS = 1000
TEXT = 40  # rounds before a new text is begun


class RandomPolicy:
    """Grows any node by any width and verifies any connected part of the tree."""

    name = "random"
    candidates = 3
    overlaps = calibrated = thrifty = uses_forecast = False

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        fresh = [node for node, proposals in enumerate(tree.proposals) if proposals is None]
        if not fresh or len(tree) > 12 or self.chance.random() < 0.2:
            return NOTHING
        steps = self.chance.randint(1, 3)
        if 0 in fresh:
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


class RandomVerifier(ModelVerifier):
    """Runs the target, then accepts a random path and goes on with a random token, drafted or not."""

    chance: random.Random
    decoding: "SpyDecoding"

    def verify(self, trunk: Trunk) -> Ready:
        step = super().verify(trunk).result().step
        path: list[int] = []

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
        return Ready(Verdict(tuple(path), self.chance.choice(others), step))


class SpyDecoding(Decoding):
    """Shows the round's trunk."""

    nodes: tuple[int, ...]

    def choose_trunk(self, state: State) -> InFlight:
        flight = super().choose_trunk(state)
        self.nodes = flight.nodes
        return flight


def assert_holds(cache: BranchCache, cached: CachedModel, text: list[int]) -> None:
    """The committed rows equal the K/V of a fresh forward over the text."""
    fresh = DynamicCache(config=cached.model.config)
    with torch.no_grad():
        cached.model(torch.tensor([text[: cache.length]]), **{cached.cache_argument: fresh})
    for ours, theirs in zip(cache.buffers.branch_layers, fresh.layers, strict=True):
        for name in ("keys", "values"):
            held = getattr(ours, name)[:, :, cache.start : cache.start + cache.length]
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
        drafter = ModelDrafter(draft_runner, Sampling(), 3, 32)
        workers = Threads(1)
        decoding = SpyDecoding(verifier, drafter, RandomPolicy(chance), Costs(), workers, overlap=False)
        verifier.decoding = decoding
        prompt = [chance.randrange(32) for _ in range(chance.randint(1, 9))]
        stepper, text = DecodingLoop(workers).rounds(decoding, prompt, 150), list(prompt)
        for _ in range(TEXT):
            with target.attached(), draft.attached():
                if not (committed := next(stepper, None)):
                    break
            text += committed
            rounds += 1
            for runner in (target_runner, draft_runner):
                runner.device.mark().wait()  # a commit may be enqueued
            assert target.cache.length == len(text) - 1
            assert_holds(target.cache, target, text)
            assert draft.cache.length <= len(text) - 1
            if draft.cache.length:
                assert_holds(draft.cache, draft, text)
            moved += bool(draft.cache.nodes)
        hits += decoding.stats.hits
    assert hits > ROUNDS // 10  # the drafted work did survive often
    assert moved > ROUNDS // 20  # with rows of its own in the draft's cache
