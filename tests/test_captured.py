"""Captured steps without a GPU: the same tokens, the rules of graphs, and the order of work on both streams."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from statistics import mean
from typing import TypeVar

import implementations
import pytest
import torch
from captured_pair import capture, capture_timed
from hypothesis import given, settings
from hypothesis import strategies as st
from recording_device import RecordedGraph, RecordingDevice
from test_hrad import untrained
from test_models import FAMILIES, PROMPT
from tiny import tiny_model

from specbranch import METHODS, SpecBranch, bundled
from specbranch.batch import Batch, Inputs, pack
from specbranch.cache import TREE_ROWS, BranchLayer
from specbranch.captured import AHEAD, COMMIT_ROWS, GRANULARITY, VERIFY_ROWS, CapturedRunner
from specbranch.costs import ModeCosts
from specbranch.device import Host
from specbranch.drafter import always
from specbranch.hrad import Outlook
from specbranch.model import CachedModel
from specbranch.runner import EagerRunner
from specbranch.sampling import Sampling
from specbranch.static import STEPS, StaticInputs
from specbranch.stats import Stats
from specbranch.tree import Tree

T = TypeVar("T")
SAMPLINGS = [{}, {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "seed": 3}]


def tiny_pair(family: str = "llama", noise: float = 0.003, dtype: torch.dtype = torch.float32) -> SpecBranch:
    """A target, and a draft that is the same model with a little noise on its weights; without, it is always right."""
    sizes = {**FAMILIES.get(family, {}), "max_position_embeddings": 2048}
    target, draft = (tiny_model(family.split("-")[0], **sizes) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return SpecBranch(target.to(dtype), draft.to(dtype))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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
            cache = pair._target.model.cache
            assert cache.length >= rows
            found[method] = tokens, [buffer[:, :rows].clone() for buffer in cache.buffers()]
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
    eager, captured = EagerRunner(CachedModel(model, "draft")), CapturedRunner(CachedModel(model, "draft"), device())
    results = []
    for runner in (eager, captured):
        cached, found = runner.model, []
        runner.reset(100)
        with cached.attached():
            runner.prefill(PROMPT[:8])
            tree = Tree.rooted(PROMPT[-1], len(PROMPT) - 1)
            backlog = PROMPT[8:-1]
            sampling = Sampling(temperature=0.8, top_p=0.9, seed=4)
            batch = cached.place(tree, [0], backlog)
            found += runner.draft(batch, 3, 30, sampling, 5, always)
            cached.cache.nodes += range(1, 5)
            for parent in range(4):
                tree = tree.hang(parent, found[parent].tokens[0][0])
            tree = tree.hang(0, 7).hang(2, 9)
            batch = cached.place(tree, [5, 6])
            found += runner.draft(batch, 3, 30, sampling, 4, always)
        results.append([(g.tokens, g.scores, g.confidence, g.entropy, g.step.rows) for g in found])
    assert results[0] == results[1]
    assert len(results[0]) == 9


def device(seed: int = 0) -> RecordingDevice:
    return RecordingDevice(seed=seed)


# ---- Memory and graphs


def ends_in(graph: RecordedGraph, op: str) -> bool:
    return graph.calls[-1][0] is getattr(torch.ops.specbranch, op).default


def rows_of(graph: RecordedGraph, op: str) -> int:
    """Rows of a captured step, by its op."""
    return next(
        args[0].shape[0] for func, args, _, _ in graph.calls if func is getattr(torch.ops.specbranch, op).default
    )


def test_every_verification_has_the_same_number_of_rows() -> None:
    """Whatever the method and the trunk: on a GPU the bits of a product depend on it, and so would the text."""
    pair = tiny_pair()
    target, _ = capture(pair)
    for method in METHODS:
        for overlap in (False, True):
            pair.generate(PROMPT, max_new_tokens=60, method=method, overlap=overlap)
    found = [rows_of(graph, "verify") for graph in target.graphs if not ends_in(graph, "kv_commit")]
    assert found == [VERIFY_ROWS]
    assert target.counts()["eager"] == len(METHODS) * 2 + target_setups(target)  # the prompts, and no step


def test_only_the_target_attends_by_position() -> None:
    """It costs a turn for each leaf, and a text does not depend on a draft's last bits."""
    pair = tiny_pair()
    devices = capture(pair)
    pair.generate(PROMPT, max_new_tokens=20)
    for device, expected in zip(devices, (True, False), strict=True):
        calls = [call for graph in device.graphs for call in graph.calls]
        attends = torch.ops.specbranch.tree_attention.default
        assert {args[-1] for func, args, _, _ in calls if func is attends} == {expected}


def target_setups(device: RecordingDevice) -> int:
    """Times that the device was asked for static memory and for a warm-up."""
    return 2 + len(device.graphs)


def test_a_trunk_is_never_longer_than_a_verification() -> None:
    pair = tiny_pair(noise=0.0)
    expected = pair.generate(PROMPT, max_new_tokens=100, method="autoregressive").tokens
    capture(pair)
    generation = pair.generate(PROMPT, max_new_tokens=100, overlap=False, method="speculative", length=50)
    assert generation.tokens == expected
    assert max(round.target[0].rows for round in generation.stats.log) == VERIFY_ROWS
    assert generation.stats.target_forwards < 8  # what did not fit into one is in the next


def test_a_step_is_captured_when_it_is_first_needed_and_never_twice() -> None:
    pair = tiny_pair()
    target, draft = capture(pair)
    pair.generate(PROMPT, max_new_tokens=20, method="autoregressive")
    assert (len(target.graphs), len(draft.graphs)) == (1, 0)
    pair.generate(PROMPT, max_new_tokens=20, method="speculative", overlap=False)
    steps = [rows_of(graph, "draft_sample") for graph in draft.graphs if not ends_in(graph, "kv_commit")]
    assert set(steps) <= {1, 2}
    for _ in range(2):
        pair.generate(PROMPT, max_new_tokens=150, overlap=True)
    counts = len(target.graphs), len(draft.graphs)
    steps = [rows_of(graph, "draft_sample") for graph in draft.graphs if not ends_in(graph, "kv_commit")]
    assert set(steps) == {1, 2, 4, 8}
    pair.generate(PROMPT, max_new_tokens=100, overlap=True, seed=1)
    pair.generate(PROMPT[:5], max_new_tokens=30, overlap=False)
    assert (len(target.graphs), len(draft.graphs)) == counts


def test_other_sampling_parameters_capture_nothing() -> None:
    pair = tiny_pair()
    ways = [{"temperature": 0.1 * i, "top_k": i, "top_p": 1 - 0.05 * i, "min_p": 0.01 * i, "seed": i} for i in range(6)]
    expected = [pair.generate(PROMPT, max_new_tokens=40, method="autoregressive", **way).tokens for way in ways]
    target, draft = capture(pair)
    for overlap in (False, True):
        pair.generate(PROMPT, max_new_tokens=150, overlap=overlap)
    before = len(target.graphs), len(draft.graphs)
    for overlap in (False, True):
        for way, tokens in zip(ways, expected, strict=True):
            assert pair.generate(PROMPT, max_new_tokens=40, overlap=overlap, **way).tokens == tokens
    assert (len(target.graphs), len(draft.graphs)) == before


def test_a_commit_moves_what_it_must() -> None:
    """A kernel over all the rows that there may be would take longer than the launch."""
    pair = tiny_pair(noise=0.02)
    _, draft = capture(pair)
    pair.generate(PROMPT, max_new_tokens=200, overlap=True)
    sizes = [graph.calls[-1][1][1].shape[0] for graph in draft.graphs if ends_in(graph, "kv_commit")]
    assert sizes
    assert set(sizes) <= set(COMMIT_ROWS)
    replays = {size: graph.replays for size, graph in zip(sizes, draft.graphs, strict=False)}
    assert COMMIT_ROWS[0] in replays


@pytest.mark.parametrize("rows", [1, 8, 9, 32, 33, 200, TREE_ROWS])
def test_commits_of_any_size_move_the_same_rows(rows: int) -> None:
    caches = []
    for runner in (EagerRunner, CapturedRunner):
        cached = CachedModel(tiny_model(max_position_embeddings=2048), "target")
        made = runner(cached, device())
        made.reset(30)
        with cached.attached():
            made.prefill([3, 1, 4, 1, 5])
        cache = cached.cache
        with torch.inference_mode():
            for place, buffer in enumerate(cache.buffers()):
                buffer.copy_(torch.arange(cache.capacity)[:, None] + 0.25 * place)
        cache.length, cache.nodes = 5, list(range(TREE_ROWS))
        made.commit(list(range(TREE_ROWS - rows, TREE_ROWS)), {})
        made.device.mark().wait()
        caches.append([buffer[:, : 30 + TREE_ROWS].clone() for buffer in cache.buffers()])
        assert cache.length == 5 + rows
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


def test_a_longer_text_than_the_cache_holds_is_captured_anew() -> None:
    pair = tiny_pair()
    target, _ = capture(pair)
    pair.generate(PROMPT, max_new_tokens=20, overlap=False)
    before = len(target.graphs)
    longer = PROMPT * (GRANULARITY // len(PROMPT))
    captured = pair.generate(longer, max_new_tokens=20, overlap=False).tokens
    assert len(target.graphs) > before
    assert captured == tiny_pair().generate(longer, max_new_tokens=20, method="autoregressive").tokens


def test_a_cache_that_grows_is_freed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the graphs, which work on it: there is not always memory for both."""
    pair = tiny_pair()
    devices = capture(pair)
    pair.generate(PROMPT, max_new_tokens=60, overlap=True)
    for device in devices:
        device.graphs.clear()  # the stand-in's own references
    old = [weakref.ref(layer.keys) for runner in (pair._target, pair._draft) for layer in runner.model.cache.layers]
    assert all(buffer() is not None for buffer in old)
    made: list[int] = []
    lazily = BranchLayer.lazy_initialization

    def watched(layer: BranchLayer, *states: torch.Tensor) -> None:
        made.append(sum(buffer() is not None for buffer in old))
        lazily(layer, *states)

    monkeypatch.setattr(BranchLayer, "lazy_initialization", watched)
    pair.generate(PROMPT * (GRANULARITY // len(PROMPT)), max_new_tokens=20, overlap=True)
    assert made == [0, 0, 0, 0]


def test_a_batch_beyond_the_largest_graph_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specbranch.captured.DRAFT_ROWS", (1, 2, 4))
    pair = tiny_pair()
    expected = pair.generate(PROMPT, max_new_tokens=60, method="autoregressive").tokens
    capture(pair)
    stats = pair.generate(PROMPT, max_new_tokens=60, overlap=True, method="ssd").stats
    assert max(step.rows for round in stats.log for step in round.draft) > 4
    assert pair.generate(PROMPT, max_new_tokens=60, overlap=True, method="ssd").tokens == expected


# ---- Captures that fail


def needs_the_host(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.max().item() < 1e9 else logits * 2


@pytest.mark.parametrize(("role", "nth"), [("target", 0), ("target", 1), *(("draft", nth) for nth in range(4))])
@pytest.mark.parametrize("place", ["first", "middle"])
def test_a_capture_that_fails_is_noted_and_decoding_goes_on_eagerly(
    monkeypatch: pytest.MonkeyPatch, role: str, nth: int, place: str
) -> None:
    """At the first graph or at a later one, in the first operation or in the middle."""
    pair = tiny_pair()
    expected = [pair.generate(PROMPT, max_new_tokens=100, method="autoregressive", **s).tokens for s in SAMPLINGS]
    devices = dict(zip(("target", "draft"), capture(pair), strict=True))
    failing = devices[role]
    original, captures = failing.capture, iter(range(1000))

    def capture_and_fail(run: Callable[[], None]) -> RecordedGraph:
        def fails() -> None:
            if place == "middle":
                run()
            needs_the_host(torch.ones(1))

        return original(fails if next(captures) == nth else run)

    monkeypatch.setattr(failing, "capture", capture_and_fail)
    with pytest.warns(RuntimeWarning, match=f"{role}: steps are not captured any more"):
        generations = [
            pair.generate(PROMPT, max_new_tokens=100, overlap=overlap, **sampling)
            for sampling, overlap in zip(SAMPLINGS, (True, False), strict=True)
        ]
    assert [generation.tokens for generation in generations] == expected
    generation = generations[-1]
    notes = {"target": generation.stats.target_runner, "draft": generation.stats.draft_runner}
    assert notes.pop(role).startswith("eager: capture failed: aten.")
    assert set(notes.values()) == {"captured"}
    assert next(captures) == nth + 1  # after that no capture was tried


def test_a_model_that_cannot_be_captured_after_all_decodes_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair()
    expected = pair.generate(PROMPT, max_new_tokens=20, method="autoregressive").tokens
    capture(pair)
    forward = CachedModel.forward
    monkeypatch.setattr(CachedModel, "forward", lambda *given, **options: needs_the_host(forward(*given, **options)))
    with pytest.warns(RuntimeWarning, match="not captured any more"):
        generation = pair.generate(PROMPT, max_new_tokens=20)
    assert generation.tokens == expected
    assert generation.stats.target_runner.startswith("eager: capture failed")


# ---- Padding


def test_padding_is_the_first_row_again() -> None:
    """So that it gives no logits that no row has: NaN of some other row would be nobody's."""
    static = StaticInputs(8, 4, spare=99, device=Host(), where=torch.device("cpu"))
    static.fill(Batch((7, 8), (20, 21), (30, 31), (1, 3), 30, 1), [-1, 0], Sampling(0.7, 5, 0.9, 0.1, seed=4))
    assert static.ids.tolist() == [7, 8, 7, 7, 7, 7, 7, 7]
    assert static.positions.tolist() == [20, 21, *[20] * 6]
    assert static.rows.tolist() == [30, 31, *[99] * 6]
    assert static.parents.tolist() == [-1, 0, *[-1] * 6]
    assert static.ancestors[:, 0].tolist() == [1, 3, *[1] * 6]
    assert static.filters.tolist() == [0.7, 5, 0.9, 0.1]
    static.go_below(8, torch.arange(8) + 40)
    assert static.ids.tolist() == [40] * 8
    assert static.positions.tolist() == [21] * 8
    assert static.rows.tolist() == [31, *[99] * 7]
    assert static.ancestors[:, 0].tolist() == [3] * 8


@pytest.mark.parametrize("emulated", [False, True])
def test_nan_in_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch, emulated: bool) -> None:
    pair = tiny_pair()
    expected = pair.generate(PROMPT, max_new_tokens=24, method="autoregressive").tokens
    forward = CachedModel.forward

    def spoiled(self: CachedModel, inputs: Inputs, keep: slice = slice(None)) -> torch.Tensor:
        logits = forward(self, inputs, keep)
        if keep != slice(None):
            return logits  # a prompt
        padding = (inputs.rows == self.cache.capacity - 1) & (torch.arange(len(inputs.rows)) > 0)
        return torch.where(padding[:, None], torch.nan, logits)

    monkeypatch.setattr(CachedModel, "forward", spoiled)
    with implementations.emulated_runtime() if emulated else nullcontext():
        capture(pair)
        generation = pair.generate(PROMPT, max_new_tokens=24, method="autoregressive")
    assert generation.tokens == expected
    assert generation.stats.target_runner == "captured"


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
    static.fill(batch, [], Sampling(seed=5))
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
    assert isinstance(pair._draft, CapturedRunner)
    waiting: list[int] = []
    enqueue = draft.enqueue

    def watching(what: str, run: Callable[[], None]) -> None:
        enqueue(what, run)
        replays = [graph.__self__ for what, graph in draft.queue if what == "replay"]
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
