"""The graphs of captured steps: when they are made, over how many rows, what they hold, and what if one cannot be."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import implementations
import pytest
import torch
from captured_pair import capture
from hypothesis import given, settings
from hypothesis import strategies as st
from recording_device import RecordedGraph, RecordingDevice
from tiny import PROMPT, tiny_model
from tiny_pair import SAMPLINGS, ends_in, rows_of, tiny_pair

from specbranch import METHODS
from specbranch.core.sampling import Sampling
from specbranch.runtime.batch import Batch, Inputs, pack
from specbranch.runtime.cache import TREE_ROWS, BranchLayer
from specbranch.runtime.device import Host
from specbranch.runtime.graphs.memory import StaticInputs, StaticSamples
from specbranch.runtime.graphs.runner import COMMIT_ROWS, GRANULARITY, VERIFY_ROWS, CapturedRunner
from specbranch.runtime.model import CachedModel
from specbranch.runtime.runner import EagerRunner
from specbranch_ext import DraftSample

T = TypeVar("T")


def test_every_verification_has_the_same_number_of_rows() -> None:
    """Whatever the method and the trunk: on a GPU the bits of a product depend on it, and so would the text."""
    pair = tiny_pair()
    target, _ = capture(pair)
    for method in METHODS:
        for overlap in (False, True):
            pair.generate(PROMPT, max_new_tokens=60, method=method, overlap=overlap)
    found = [rows_of(graph, "verify") for graph in target.graphs if not ends_in(graph, "kv_commit")]
    assert found == [VERIFY_ROWS]
    probed = 1  # once, whether rows depend on each other
    assert target.counts()["eager"] == len(METHODS) * 2 + target_setups(target) + probed  # the prompts, and no step


def test_only_the_target_attends_by_position() -> None:
    """It costs a turn for each leaf, and a text does not depend on a draft's last bits."""
    pair = tiny_pair()
    devices = capture(pair)
    pair.generate(PROMPT, max_new_tokens=20, method="speculative")
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
        pair.generate(PROMPT, max_new_tokens=150, overlap=True, retrieval=False)  # which adds rows
    counts = len(target.graphs), len(draft.graphs)
    steps = [rows_of(graph, "draft_sample") for graph in draft.graphs if not ends_in(graph, "kv_commit")]
    assert set(steps) == {1, 2, 4, 8}
    pair.generate(PROMPT, max_new_tokens=100, overlap=True, retrieval=False, seed=1)
    pair.generate(PROMPT[:5], max_new_tokens=30, overlap=False, retrieval=False)
    assert (len(target.graphs), len(draft.graphs)) == counts


def test_other_sampling_parameters_capture_nothing() -> None:
    pair = tiny_pair()
    ways: list[dict[str, Any]] = [
        {"temperature": 0.1 * i, "top_k": i, "top_p": 1 - 0.05 * i, "min_p": 0.01 * i, "seed": i} for i in range(6)
    ]
    expected = [pair.generate(PROMPT, max_new_tokens=40, method="autoregressive", **way).tokens for way in ways]
    target, draft = capture(pair)
    for overlap in (False, True):
        pair.generate(PROMPT, max_new_tokens=150, overlap=overlap, thrifty=False)
    before = len(target.graphs), len(draft.graphs)
    for overlap in (False, True):
        for way, tokens in zip(ways, expected, strict=True):
            made = pair.generate(PROMPT, max_new_tokens=40, overlap=overlap, thrifty=False, **way)
            assert made.tokens == tokens
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
        made = runner(cached, RecordingDevice())
        made.reset(30)
        with cached.attached():
            made.prefill([3, 1, 4, 1, 5])
        cache = cached.cache
        with torch.inference_mode():
            for place, buffer in enumerate(cache.buffers.tensors()):
                buffer.copy_(torch.arange(cache.buffers.capacity)[:, None] + 0.25 * place)
        cache.length, cache.nodes, cache.ancestors = 5, list(range(TREE_ROWS)), [1 << i for i in range(TREE_ROWS)]
        made.commit(list(range(TREE_ROWS - rows, TREE_ROWS)), {})
        made.device.mark().wait()
        caches.append([buffer[:, : 30 + TREE_ROWS].clone() for buffer in cache.buffers.tensors()])
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
    old = [
        weakref.ref(layer.keys)
        for runner in (pair.pair.target, pair.pair.draft)
        for layer in runner.model.cache.buffers.layers
    ]
    assert all(buffer() is not None for buffer in old)
    made: list[int] = []
    lazily = BranchLayer.lazy_initialization

    def watched(layer: BranchLayer, *states: torch.Tensor) -> None:
        made.append(sum(buffer() is not None for buffer in old))
        lazily(layer, *states)

    monkeypatch.setattr(BranchLayer, "lazy_initialization", watched)
    pair.generate(PROMPT * (GRANULARITY // len(PROMPT)), max_new_tokens=20, overlap=True)
    assert made == [2, 2, 0, 0]  # the draft frees its own when it reads: never more than both new ones


def test_a_batch_beyond_the_largest_graph_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specbranch.runtime.graphs.runner.DRAFT_ROWS", (1, 2, 4))
    pair = tiny_pair()
    expected = pair.generate(PROMPT, max_new_tokens=60, method="autoregressive").tokens
    capture(pair)
    stats = pair.generate(PROMPT, max_new_tokens=60, overlap=True, method="ssd").stats
    assert max(step.rows for round in stats.log for step in round.draft) > 4
    assert pair.generate(PROMPT, max_new_tokens=60, overlap=True, method="ssd").tokens == expected


# ---- Captures that fail


def needs_the_host(logits: torch.Tensor) -> torch.Tensor:
    return logits if (logits < 1e9).all().item() else logits * 2


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


SAMPLES = StaticSamples.within(torch.zeros(StaticSamples.words(8, 1), dtype=torch.int64), 8, 1)


def drafted(tokens: Sequence[int]) -> DraftSample:
    """What a draft step gives: one candidate for each row."""
    ones = torch.ones(len(tokens), 1)
    return DraftSample(torch.tensor(tokens)[:, None], ones, ones, ones[:, 0])


def test_padding_is_the_first_row_again() -> None:
    """So that it gives no logits that no row has: NaN of some other row would be nobody's."""
    static = StaticInputs(8, 4, spare=99, device=Host(), where=torch.device("cpu"))
    static.fill(Batch((7, 8), (20, 21), (30, 31), (1, 3), 30, 1), [-1, 0], Sampling(0.7, 5, 0.9, 0.1, seed=4))
    assert static.ids.tolist() == [7, 8, 7, 7, 7, 7, 7, 7]
    assert static.positions.tolist() == [20, 21, *[20] * 6]
    assert static.next_positions.tolist() == [21, 22, *[21] * 6]
    assert static.rows.tolist() == [30, 31, *[99] * 6]
    assert static.parents.tolist() == [-1, 0, *[-1] * 6]
    assert static.ancestors[:, 0].tolist() == [1, 3, *[1] * 6]
    assert static.filters.tolist() == [0.7, 5, 0.9, 0.1]
    static.advance(8, drafted(range(40, 48)), SAMPLES)
    assert static.ids.tolist() == [40] * 8
    assert static.positions.tolist() == [21] * 8
    assert static.next_positions.tolist() == [22] * 8
    assert static.rows.tolist() == [31, *[99] * 7]
    assert static.ancestors[:, 0].tolist() == [3] * 8


@pytest.mark.parametrize("emulated", [False, True])
def test_nan_in_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch, emulated: bool) -> None:
    pair = tiny_pair()
    expected = pair.generate(PROMPT, max_new_tokens=24, method="autoregressive").tokens
    forward = CachedModel.forward

    def spoiled(self: CachedModel, inputs: Inputs, keep: Any = slice(None), *where: Any, **more: Any) -> torch.Tensor:
        logits = forward(self, inputs, keep, *where, **more)
        if keep != slice(None):
            return logits  # a prompt
        padding = (inputs.rows == self.cache.buffers.capacity - 1) & (torch.arange(len(inputs.rows)) > 0)
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
        static.advance(8, drafted(tokens + [0] * (8 - leaves)), SAMPLES)
        batch = batch.below(tokens)
        assert static.ids[:leaves].tolist() == list(batch.tokens)
        assert static.positions[:leaves].tolist() == list(batch.positions)
        assert static.next_positions[:leaves].tolist() == [position + 1 for position in batch.positions]
        assert static.rows.tolist() == [*batch.rows, *[999] * (8 - leaves)]
        assert static.ancestors[:leaves].tolist() == pack(batch.ancestors, 4).tolist()
    assert (static.prefix, static.seed, static.slot) == (prefix, 5, 3)
