"""Captured steps without a GPU: the same tokens, the rules of graphs, and the order of work on both streams."""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import implementations
import pytest
import torch
from captured_pair import capture
from hypothesis import given, settings
from hypothesis import strategies as st
from recording_device import NotCapturable, RecordingDevice
from test_hrad import untrained
from test_models import FAMILIES, PROMPT
from tiny import tiny_model

from specbranch import METHODS, SpecBranch, bundled
from specbranch.batch import Batch, pack
from specbranch.captured import AHEAD, GRANULARITY, KEPT, ROWS, CapturedRunner
from specbranch.costs import ModeCosts
from specbranch.device import Host
from specbranch.hrad import Outlook
from specbranch.model import CachedModel
from specbranch.runner import EagerRunner
from specbranch.sampling import Sampling
from specbranch.static import STEPS, StaticInputs
from specbranch.stats import Stats
from specbranch.tree import Tree

T = TypeVar("T")
SAMPLINGS = [{}, {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "seed": 3}]


def tiny_pair(family: str = "llama", noise: float = 0.003) -> SpecBranch:
    """A target, and a draft that is the same model with a little noise on its weights; without, it is always right."""
    sizes = {**FAMILIES.get(family, {}), "max_position_embeddings": 2048}
    target, draft = (tiny_model(family.split("-")[0], **sizes) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return SpecBranch(target, draft)


@pytest.mark.parametrize("family", FAMILIES)
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
    eager, captured = EagerRunner(CachedModel(model, "draft")), CapturedRunner(CachedModel(model, "draft"), device())
    results = []
    for runner in (eager, captured):
        cached, found = runner.model, []
        cached.reset(100)
        with cached.attached():
            runner.prefill(PROMPT[:8])
            tree = Tree.rooted(PROMPT[-1], len(PROMPT) - 1)
            backlog = PROMPT[8:-1]
            sampling = Sampling(temperature=0.8, top_p=0.9, seed=4)
            batch = cached.place(tree, [0], backlog)
            found += runner.draft(batch, 3, 30, sampling, 5, lambda: True)
            cached.cache.nodes += range(1, 5)
            for parent in range(4):
                tree = tree.hang(parent, found[parent].tokens[0][0])
            tree = tree.hang(0, 7).hang(2, 9)
            batch = cached.place(tree, [5, 6])
            found += runner.draft(batch, 3, 30, sampling, 4, lambda: True)
        results.append([(g.tokens, g.scores, g.confidence, g.entropy, g.step.rows) for g in found])
    assert results[0] == results[1]
    assert len(results[0]) == 9


def device(seed: int = 0) -> RecordingDevice:
    return RecordingDevice(seed=seed)


# ---- Memory and graphs


def test_the_largest_graph_is_captured_first_and_nothing_is_captured_twice() -> None:
    pair = tiny_pair()
    target, draft = capture(pair)
    pair.generate(PROMPT, max_new_tokens=20, overlap=True)
    moving, *steps = target.graphs
    assert moving.calls[-1][0] == torch.ops.specbranch.kv_commit.default
    assert [graph.calls[-1][1][0].shape[0] - 2 for graph in steps] == list(ROWS)  # the results that go to the host
    counts = len(target.graphs), len(draft.graphs)
    assert counts == (1 + len(ROWS), 1 + len(ROWS))
    for seed in range(3):
        pair.generate(PROMPT, max_new_tokens=20 + seed, overlap=True, seed=seed)
        pair.generate(PROMPT[:5], max_new_tokens=30, overlap=False)
    assert (len(target.graphs), len(draft.graphs)) == counts


def test_a_longer_text_than_the_cache_holds_is_captured_anew() -> None:
    pair = tiny_pair()
    target, _ = capture(pair)
    pair.generate(PROMPT, max_new_tokens=20)
    before = len(target.graphs)
    longer = PROMPT * (GRANULARITY // len(PROMPT))
    captured = pair.generate(longer, max_new_tokens=20).tokens
    assert len(target.graphs) == 2 * before
    assert captured == tiny_pair().generate(longer, max_new_tokens=20, method="autoregressive").tokens


def test_only_the_last_sampling_parameters_keep_their_graphs() -> None:
    pair = tiny_pair()
    target, _ = capture(pair)
    for i in range(KEPT + 2):
        pair.generate(PROMPT, max_new_tokens=4, temperature=0.1 * (i + 1))
    assert isinstance(pair._target, CapturedRunner)
    assert len(pair._target._verifying) == KEPT
    before = len(target.graphs)
    pair.generate(PROMPT, max_new_tokens=4, temperature=0.1 * (KEPT + 2))
    assert len(target.graphs) == before


def test_a_batch_beyond_the_largest_graph_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specbranch.captured.ROWS", (4, 2, 1))
    pair = tiny_pair()
    expected = pair.generate(PROMPT, max_new_tokens=60, method="autoregressive").tokens
    capture(pair)
    stats = pair.generate(PROMPT, max_new_tokens=60, overlap=False, method="speculative", length=9).stats
    assert max(round.target[0].rows for round in stats.log) > 4
    assert pair.generate(PROMPT, max_new_tokens=60, overlap=True).tokens == expected


def test_a_step_that_needs_the_host_is_found_out_when_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair()
    capture(pair)
    forward = CachedModel.forward

    def asking(self: CachedModel, inputs: object, keep: slice = slice(None)) -> torch.Tensor:
        logits = forward(self, inputs, keep)
        return logits if logits.max().item() < 1e9 else logits * 2

    monkeypatch.setattr(CachedModel, "forward", asking)
    with pytest.raises(NotCapturable, match="reads a value on the host"):
        pair.generate(PROMPT, max_new_tokens=4)


@settings(deadline=None)
@given(st.data())
def test_the_device_makes_the_next_batch_as_the_host_does(data: st.DataObject) -> None:
    leaves, others = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    n, prefix, used = leaves + others, data.draw(st.integers(0, 50)), data.draw(st.integers(0, 200))
    bits = st.integers(0, 2 ** (used + n) - 1)
    # Rows that catch up lie before the leaves in the cache, and behind them in the batch.
    rows = [prefix + used + i for i in range(n)]
    batch = Batch(
        tuple(data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n))),
        tuple(data.draw(st.lists(st.integers(0, 999), min_size=n, max_size=n))),
        (*rows[others:], *rows[:others]),
        tuple(data.draw(bits) | 1 << (row - prefix) for row in (*rows[others:], *rows[:others])),
        prefix,
        leaves,
    )
    static = StaticInputs(8, 4, spare=999, device=Host(), where=torch.device("cpu"))
    static.fill(batch, [], seed=5)
    for _ in range(3):
        tokens = data.draw(st.lists(st.integers(0, 99), min_size=leaves, max_size=leaves))
        static.go_below(8, torch.tensor(tokens + [0] * (8 - leaves)))
        batch = batch.below(tokens)
        assert static.ids[:leaves].tolist() == list(batch.tokens)
        assert static.positions[:leaves].tolist() == list(batch.positions)
        assert static.rows.tolist() == [*batch.rows, *[999] * (8 - leaves)]
        assert static.ancestors[:leaves].tolist() == pack(batch.ancestors, 4).tolist()
    assert (static.prefix, static.seed, static.slot) == (prefix, 5, 3)


# ---- The order of work


def test_one_wait_for_each_model_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's step is enqueued first, the draft's follow, and the host waits once for either; then it commits."""
    pair = tiny_pair()
    target, draft = capture(pair)
    pair.generate(PROMPT, max_new_tokens=8, overlap=True)  # captures
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
    assert isinstance(pair._draft, CapturedRunner)
    moving = pair._draft._committing
    waiting: list[int] = []
    enqueue = draft.enqueue

    def watching(what: str, run: Callable[[], None]) -> None:
        enqueue(what, run)
        replays = [graph.__self__ for what, graph in draft.queue if what == "replay"]
        waiting.append(sum(graph is not moving for graph in replays))

    draft.enqueue = watching  # type: ignore[method-assign]
    pair.generate(PROMPT, max_new_tokens=100, overlap=True)
    assert max(waiting) == AHEAD
    assert not target.queue
    assert not draft.queue  # nothing is left behind


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
        monkeypatch.setattr(pair.hrad, "predict", lambda x, seen=seen: seen.append(x.clone()) or Outlook(0.2, 0.5, 0.3))
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
