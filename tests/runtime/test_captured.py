"""Captured steps without a GPU: the same tokens, the rules of graphs, and the order of work on both streams."""

from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any, TypeVar, cast

import implementations
import pytest
import torch
from captured_pair import capture, capture_timed
from recording_device import RecordingDevice
from tiny import FAMILIES, PROMPT, tiny_model
from tiny_pair import SAMPLINGS, ends_in, tiny_pair
from trees import place
from untrained import untrained

from specbranch import METHODS, SpecBranch, bundled
from specbranch.core.messages import Forecast
from specbranch.core.sampling import Sampling
from specbranch.core.stats import Stats
from specbranch.core.tree import Tree
from specbranch.policies.costs import ModeCosts
from specbranch.runtime.graphs.memory import STEPS
from specbranch.runtime.graphs.runner import AHEAD, CapturedRunner
from specbranch.runtime.model import CachedModel
from specbranch.runtime.runner import EagerRunner, Leaves

T = TypeVar("T")


# Captured; eager, they run in test_models.py.
BY_NIGHT = ("qwen2-sliding", "mistral", "gemma3_text", "phi3", "qwen3")


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[pytest.mark.nightly] * (family in BY_NIGHT)) for family in FAMILIES],
)
def test_every_family_decodes_the_same_tokens_captured(family: str) -> None:
    pair = tiny_pair(family)
    expected = [pair.generate(PROMPT, max_new_tokens=40, method="autoregressive", **s).tokens for s in SAMPLINGS]
    target, draft = capture(pair)
    for method, overlap in (("specbranch", True), ("specbranch", False), ("pearl", True), ("autoregressive", False)):
        for tokens, sampling in zip(expected, SAMPLINGS, strict=True):
            generation = pair.generate(PROMPT, max_new_tokens=40, method=method, overlap=overlap, **sampling)
            assert generation.tokens == tokens, (method, overlap)
            assert generation.stats.target_runner == "captured"
    assert all(any(graph.replays for graph in device.graphs) for device in (target, draft))


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_the_cuda_kernels_decode_the_same_tokens_captured(family: str) -> None:
    """Emulated, with what they alone do: padding, marks instead of errors, prefix and rows from memory."""
    pair = tiny_pair(family)
    expected = [pair.generate(PROMPT, max_new_tokens=24, method="autoregressive", **s).tokens for s in SAMPLINGS]
    with implementations.emulated_runtime():
        target, _ = capture(pair)
        for method, overlap in (("specbranch", True), ("speculative", False)):
            for tokens, sampling in zip(expected, SAMPLINGS, strict=True):
                result = pair.generate(PROMPT, max_new_tokens=24, method=method, overlap=overlap, **sampling)
                assert result.tokens == tokens, (method, overlap)
    assert any(graph.replays for graph in target.graphs)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)], ids=str)
def test_the_cuda_kernels_give_every_method_the_same_bits(dtype: torch.dtype) -> None:
    """The text, and the K/V of its tokens, each a node of another tree with every method: where attention took keys in
    another order, float32 shows it at once, while 16 bits and a token hide it nearly always."""
    pair = tiny_pair(noise=0.02, dtype=dtype)
    prompt, length = PROMPT * 4, 40  # a tile of 64 keys ends on the way
    rows = len(prompt) + length - 2
    found: dict[str, tuple[list[int], list[torch.Tensor]]] = {}
    with implementations.emulated_runtime():
        capture(pair)
        for method in METHODS:
            tokens = pair.generate(prompt, max_new_tokens=length, method=method, temperature=0.9, seed=3).tokens
            cache = pair.pair.target.model.cache
            assert cache.length >= rows
            found[method] = tokens, [buffer[:, :rows].clone() for buffer in cache.buffers.tensors()]
    expected = found.pop("autoregressive")
    for method, (tokens, cached) in found.items():
        assert tokens == expected[0], method
        assert all(torch.equal(a, b) for a, b in zip(cached, expected[1], strict=True)), method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("overlap", [False, True])
def test_every_method_decodes_the_same_tokens_captured(method: str, overlap: bool) -> None:
    pair = tiny_pair()
    expected = pair.generate(PROMPT, max_new_tokens=150, method="autoregressive", temperature=0.7, seed=5)
    for seed in range(2):  # of the devices: how far work has come when the host asks
        capture(pair, seed)
        result = pair.generate(PROMPT, max_new_tokens=150, method=method, overlap=overlap, temperature=0.7, seed=5)
        assert result.tokens == expected.tokens


def test_the_bundled_pair_end_to_end() -> None:
    pair = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32")
    records = bundled.prompts()[:3]
    expected = [pair.generate(r["prompt"], max_new_tokens=64, method="autoregressive") for r in records]
    capture(pair)
    for record, plain in zip(records, expected, strict=True):
        for overlap in (False, True):
            generation = pair.generate(record["prompt"], max_new_tokens=64, overlap=overlap)
            assert (generation.tokens, generation.text) == (plain.tokens, plain.text)


def test_bursts_are_long_and_what_they_drafted_is_used() -> None:
    pair = tiny_pair(noise=0.0)
    capture(pair)
    stats = pair.generate(PROMPT, max_new_tokens=150, overlap=True, method="pearl").stats
    assert stats.accepted == stats.verified > 100  # what a burst drafts is what the draft would say step by step
    assert stats.hits > 0.7 * stats.rounds
    assert stats.draft_forwards > 3 * stats.rounds


def test_steps_equal_the_eager_runner_s() -> None:
    """Every list of a burst: tokens, scores, confidence, entropy; with a backlog, and below two leaves."""
    model = tiny_model(max_position_embeddings=2048)
    eager, captured = (
        EagerRunner(CachedModel(model, "draft")),
        CapturedRunner(CachedModel(model, "draft"), RecordingDevice()),
    )
    results = []
    for runner in (eager, captured):
        cached, found = runner.model, []
        runner.reset(100)
        with cached.attached():
            runner.prefill(PROMPT[:8])
            tree = Tree(PROMPT[-1], len(PROMPT) - 1)
            backlog = PROMPT[8:-1]
            sampling = Sampling(temperature=0.8, top_p=0.9, seed=4)
            batch = place(cached, tree, [0], backlog)
            found += runner.draft([Leaves(cached, batch, sampling)], 3, 30, 5, lambda under_way: True)[0]
            cached.cache.add(range(1, 5), range(4))
            for parent in range(4):
                tree.add(parent, found[parent].tokens[0][0], 1.0)
            tree.add(0, 7, 1.0)
            tree.add(2, 9, 1.0)
            batch = place(cached, tree, [5, 6])
            found += runner.draft([Leaves(cached, batch, sampling)], 3, 30, 4, lambda under_way: True)[0]
        results.append([(g.tokens, g.scores, g.confidence, g.entropy, g.step.rows) for g in found])
    assert results[0] == results[1]
    assert len(results[0]) == 9


# ---- The order of work


def test_one_wait_for_each_model_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's step is enqueued first, the draft's follow, and the host waits once for either; then it commits."""
    pair = tiny_pair()
    target, draft = capture(pair)
    for _ in range(4):
        pair.generate(PROMPT, max_new_tokens=100, overlap=True)  # captures
    log = target.log
    rounds: list[int] = []
    monkeypatch.setattr(ModeCosts, "burst", lambda self: STEPS)
    monkeypatch.setattr(Stats, "begin_round", note_calls(Stats.begin_round, lambda: rounds.append(len(log))))
    log.clear()
    stats = pair.generate(PROMPT, max_new_tokens=100, overlap=True).stats
    last = 1 + max(place for place, (_, what, _) in enumerate(log) if what != "wait")  # then the pair comes to rest
    assert len(rounds) == stats.rounds
    for (begin, end), round in zip(pairwise([*rounds, last]), stats.log, strict=True):
        done = {
            name: [(place, what, blocking) for place, (who, what, blocking) in enumerate(log[begin:end]) if who == name]
            for name in ("target", "draft")
        }
        asked = [what for _, what, _ in done["target"] if what != "wait"]
        assert asked in (["copy", "replay"], ["copy", "replay"] * 2)  # the step, and a commit if one moves
        steps = [place for place, what, _ in done["draft"] if what == "replay"]
        assert 0 <= len(steps) - len(round.draft) <= 1  # the commit
        if steps and not any(step.begin < round.target[0].begin for step in round.draft):
            assert done["target"][1][0] < steps[0]
        waits = {name: [place for place, _, blocking in entries if blocking] for name, entries in done.items()}
        assert len(waits["target"]) <= 1
        bursts, commit = divmod(sum(what == "copy" for _, what, _ in done["draft"]), 2)
        assert len(waits["draft"]) <= max(bursts, commit)  # without a burst, a commit may find the one before under way
    assert draft.counts()["eager"] == 1  # the prompt
    assert max(len(round.draft) for round in stats.log) > 4


def note_calls(function: Callable[..., T], note: Callable[[], None]) -> Callable[..., T]:
    def noted(*args: object, **kwargs: object) -> T:
        note()
        return function(*args, **kwargs)

    return noted


def test_the_draft_is_fed_while_the_target_works_and_not_beyond() -> None:
    """At most two steps are enqueued, so that the draft has stopped soon after the verdict."""
    pair = tiny_pair()
    target, draft = capture(pair)
    pair.generate(PROMPT, max_new_tokens=8, overlap=True)
    assert isinstance(pair.pair.draft, CapturedRunner)
    waiting: list[int] = []
    enqueue = draft.enqueue

    def watching(what: str, run: Callable[[], object]) -> None:
        enqueue(what, run)
        replays = [cast(Any, run).__self__ for what, run in draft.queue if what == "replay"]
        waiting.append(sum(not ends_in(graph, "kv_commit") for graph in replays))

    draft.enqueue = watching  # type: ignore[method-assign]
    pair.generate(PROMPT, max_new_tokens=100, overlap=True)
    assert max(waiting) == AHEAD
    assert not target.queue
    assert not draft.queue  # nothing is left behind


@pytest.mark.parametrize("draft_seconds", [1.8e-3, 0.55e-3])
def test_a_verdict_is_taken_when_it_is_there(draft_seconds: float) -> None:
    """A step behind another one ends two steps later: it is not begun for a verdict that comes sooner."""
    pair = tiny_pair()
    capture_timed(pair, target_seconds=6.5e-3, draft_seconds=draft_seconds)
    late: list[float] = []
    for seed in range(3):
        log = pair.generate(PROMPT, max_new_tokens=200, overlap=True, seed=seed).stats.log
        late += [max(0.0, round.draft[-1].end - round.target[0].end) for round in log[4:] if round.draft]
    assert len(late) > 150
    assert mean(late) < 0.35 * draft_seconds  # 0.6 where steps under way do not count


def test_a_pair_takes_the_same_course_every_time() -> None:
    """What is asserted here about the order of work does not depend on how fast, or how busy, the machine is."""
    courses = []
    for _ in range(2):
        pair = tiny_pair()
        target, _ = capture(pair)
        stats = pair.generate(PROMPT, max_new_tokens=100).stats
        courses.append((target.log, stats.rounds, stats.drafted, stats.log))
    assert courses[0] == courses[1]


def test_a_predictor_sees_the_same_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks do not run when a graph is replayed: what they saw lies where the graph leaves it."""
    features: list[list[torch.Tensor]] = []
    for captured in (False, True):
        pair = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32")
        pair.hrad = untrained(pair)
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(
            pair.hrad, "predict", lambda x, seen=seen: seen.append(x.clone()) or Forecast(0.2, 0.5, 0.3)
        )
        if captured:
            capture(pair)
        for seed in (1, 2):
            stats = pair.generate(
                "def area(", max_new_tokens=24, method="specbranch-paper", overlap=False, temperature=0.8, seed=seed
            ).stats
        assert (stats.target_runner == "captured") == captured
        features.append(seen)
    assert len(features[0]) == len(features[1]) > 10
    assert all(torch.equal(eager, replayed) for eager, replayed in zip(*features, strict=True))
