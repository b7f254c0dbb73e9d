"""Random trees, random verdicts: after every round both caches hold the committed text, and nothing else."""

import random

import pytest
from random_rounds import RandomPolicy, RandomRetriever, RandomVerifier, SpyDecoding, assert_holds
from recording_device import RecordingDevice
from tiny import tiny_model

from specbranch.core.sampling import Sampling
from specbranch.drafters.model import ModelDrafter
from specbranch.loop import DecodingLoop
from specbranch.policies.costs import Costs
from specbranch.runtime.graphs.runner import CapturedRunner
from specbranch.runtime.model import CachedModel
from specbranch.runtime.runner import EagerRunner, Runner
from specbranch.runtime.workers import Threads

ROUNDS = 1000
TEXT = 40  # rounds before a new text is begun


@pytest.mark.parametrize("retrieving", [False, True], ids=["", "retrieving"])
@pytest.mark.parametrize("captured", [False, True])
def test_caches_equal_a_fresh_forward_after_every_round(captured: bool, retrieving: bool) -> None:
    """retrieving: the draft runs over nodes and those above them in one step."""
    chance = random.Random(5)
    target = CachedModel(tiny_model(seed=1), "target")
    draft = CachedModel(tiny_model(seed=2, num_hidden_layers=1), "draft")
    target_runner: Runner = CapturedRunner(target, RecordingDevice(seed=1)) if captured else EagerRunner(target)
    draft_runner: Runner = CapturedRunner(draft, RecordingDevice(seed=2)) if captured else EagerRunner(draft)
    rounds = hits = moved = retrieved = related = 0
    steps: list[bool] = []  # whether one held a node and its parent
    while rounds < ROUNDS:
        target.reset(200)
        draft.reset(200)
        verifier = RandomVerifier(target_runner, Sampling())
        verifier.chance = chance
        drafter = ModelDrafter(draft_runner, Sampling(), 3, 32)
        workers = Threads(1)
        decoding = SpyDecoding(verifier, drafter, RandomPolicy(chance), Costs(), workers, overlap=False)
        decoding.retriever = RandomRetriever() if retrieving else None
        decoding.steps_together = steps
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
            assert_holds(target, text)
            assert draft.cache.length <= len(text) - 1
            if draft.cache.length:
                assert_holds(draft, text)
            moved += bool(draft.cache.nodes)
        hits += decoding.stats.hits
        retrieved += decoding.stats.retrieved_accepted
        related += decoding.related
    assert hits > ROUNDS // 10  # the drafted work did survive often
    assert moved > ROUNDS // 20  # with rows of its own in the draft's cache
    assert (retrieved > ROUNDS // 10) == (sum(steps) > ROUNDS // 20) == (related > ROUNDS // 20) == retrieving
