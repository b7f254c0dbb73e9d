"""The captured runner: one model's steps as CUDA graphs over static memory.

On a GPU a small model is bound by the launches of its kernels, so a forward called from Python costs as much as a large
model's. A graph is one launch. It is captured when a step first needs it; everything that varies between steps is read
from static memory. A draft step writes the next step's batch itself, so that a burst of steps needs no host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from specbranch.runtime.batch import WORD, Batch
from specbranch.runtime.cache import TREE_ROWS, BranchCache
from specbranch.runtime.device import Graph, GraphDevice, Mark, step_between
from specbranch.runtime.graphs.memory import STEPS, StaticCommit, StaticInputs, StaticSamples
from specbranch.runtime.graphs.together import ForwardGraph, SharingRunner, TextGraphs
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.model import CachedModel
from specbranch.runtime.modes import inference
from specbranch.runtime.runner import (
    EagerRunner,
    Judged,
    Leaves,
    PendingVerdict,
    PendingWalk,
    Runner,
    Samples,
    drafted_anew,
    judged_anew,
)
from specbranch.stages import ShouldContinue
from specbranch_ext import draft_sample, kv_commit, verify

T = TypeVar("T")

# Of every verification, whatever the method and however long its trunk: matrix products choose their kernels, and so
# their last bits, by the number of rows. A forward over so few is bound by its weights and costs what one row does.
VERIFY_ROWS = 32
DRAFT_ROWS = (1, 2, 4, 8, 16, 32, 64)
COMMIT_ROWS = (8, 32, TREE_ROWS)
KEPT = 4  # draft graphs, by candidates, vocabulary and where windows end at a gap, that are kept
GRANULARITY = 1024  # of the cache's capacity: graphs are captured anew for another cache
AHEAD = 2  # draft steps that are enqueued at most: one runs, one waits


@dataclass(frozen=True)
class VerifyGraph:
    """Forward and `verify`, the result copied to `host`: [accepted, next token, path …]. logits: [n, V], until the next
    replay. hidden: where it leaves what a tap saw."""

    graph: Graph
    host: Tensor
    logits: Tensor
    hidden: list[Tensor]


@dataclass(frozen=True)
class DraftGraphs:
    """By rows: forward, `draft_sample`, and the next step's batch. The results lie in `samples`."""

    run: Callable[[int], None]
    samples: StaticSamples
    host: StaticSamples
    by_rows: dict[int, Graph] = field(default_factory=dict)


class CapturedRunner:
    """Replays graphs; what no graph fits (a prompt, a batch beyond the largest) it leaves to the eager runner.

    The same results as the eager runner's: padding changes no row, and sampling is a function of the logits, the seed
    and the position. Of a batch only results travel to the host, in one copy for a verdict and one for a burst.
    After a capture that failed it is an eager runner, and its note says why.
    """

    def __init__(self, model: CachedModel, device: GraphDevice, verify_rows: int = VERIFY_ROWS) -> None:
        """verify_rows: of every verification; texts of different methods are equal to the bit for one number only."""
        self.model, self.device = model, device
        self.most_rows = verify_rows
        self.burst, self.note = STEPS, "captured"
        self.eager = EagerRunner(model, device)
        model.granularity = GRANULARITY
        self._failed = False
        self._cache: BranchCache | None = None  # that the graphs work on
        self._verifying: dict[FeatureTap | None, VerifyGraph] = {}
        self._drafting: dict[Hashable, DraftGraphs] = {}
        self._forwards: dict[Hashable, ForwardGraph] = {}
        self._committing: dict[int, Graph] = {}

    def another(self) -> CapturedRunner | EagerRunner:
        model = self.model.another()
        if self._failed:
            return EagerRunner(model, self.device, self.note.removeprefix("eager: "))
        return CapturedRunner(model, self.device, self.most_rows)

    def beside(self, cache: BranchCache) -> Runner:
        """With graphs of those buffers."""
        model = self.model.another(cache)
        if self._failed:
            return EagerRunner(model, self.device, self.note.removeprefix("eager: "))
        return SharingRunner(model, self.device, TextGraphs(cache.buffers, self.device, model.device))

    def reset(self, tokens: int, text: Sequence[int] = ()) -> None:
        if not self.model.holds(tokens):
            self._forget()  # else the graphs would keep the old cache's memory
        self.eager.reset(tokens, text)

    def prefill(self, tokens: Sequence[int]) -> None:
        self.eager.prefill(tokens)

    def verify(self, texts: Sequence[Judged]) -> Sequence[PendingVerdict | PendingWalk]:
        batch, walk = texts[0].batch, texts[0].walk
        fits = is_captured_alone(texts) and len(batch) <= self.most_rows
        found = self._captured(fits, self._verify_graph)
        if found is None:
            return self.eager.verify(texts)
        begin, rows = self.device.mark(), len(batch)
        self.inputs.fill(batch, list(texts[0].parents), texts[0].sampling)
        found.graph.replay()
        if walk is not None:
            return [PendingWalk(found.logits[:rows], walk, begin, self.device.mark(), self.device, found.hidden, rows)]
        host = found.host
        if texts[0].allowed is not None:
            host = judged_anew(self.device, found.logits[:rows], self.inputs.of(rows), texts, [slice(0, rows)])
        return [PendingVerdict(host, begin, self.device.mark(), found.hidden, rows=rows)]

    def draft(
        self,
        texts: Sequence[Leaves],
        candidates: int,
        vocabulary: int,
        steps: int,
        should_continue: ShouldContinue,
    ) -> list[list[Samples]]:
        batch = texts[0].batch
        # A graph cannot ask the host.
        fits = is_captured_alone(texts) and texts[0].rules is None and len(batch) <= DRAFT_ROWS[-1]
        if texts[0].allowed is not None:
            forward = self._captured(fits, lambda: self._forward_graph(fitting(DRAFT_ROWS, len(batch))))
            if forward is None:
                return self.eager.draft(texts, candidates, vocabulary, steps, should_continue)
            begin = self.device.mark()
            self.inputs.fill(batch, [], texts[0].sampling)
            forward.graph.replay()
            return drafted_anew(
                self.device, forward.logits[:, :vocabulary], begin, texts, candidates, [slice(0, len(batch))]
            )
        rows = [len(batch), batch.leaves] if steps > 1 else [len(batch)]
        found = self._captured(fits, partial(self._draft_graphs, candidates, vocabulary, rows))
        if found is None:
            return self.eager.draft(texts, candidates, vocabulary, steps, should_continue)
        marks = [self.device.mark()]
        self.inputs.fill(batch, [], texts[0].sampling)
        found.by_rows[fitting(DRAFT_ROWS, len(batch))].replay()
        marks.append(self.device.mark())
        while len(marks) <= min(steps, STEPS) and self._turn(marks, should_continue):
            found.by_rows[fitting(DRAFT_ROWS, batch.leaves)].replay()
            marks.append(self.device.mark())
        self.device.copy(found.host.buffer, found.samples.buffer)
        arrived = self.device.mark()
        arrived.wait()
        return [self._samples(found.host, batch, marks)]

    def commit(self, path: Sequence[int], survivors: Mapping[int, int]) -> None:
        cache = self.model.cache
        start = cache.length
        if not (moved := cache.accept(path, survivors)):
            return
        graph = self._captured(True, partial(self._commit_graph, len(moved)))
        if graph is None:
            with self.device.running():
                cache.move(moved, start)
            return
        self._commit.fill(moved, start)
        graph.replay()

    def _turn(self, marks: list[Mark], should_continue: ShouldContinue) -> bool:
        """Wait until another step may be enqueued; False when there is to be none."""
        while True:
            under_way = sum(not mark.done() for mark in marks[1:][-AHEAD:])
            if not should_continue(min(under_way, AHEAD - 1)):
                return False
            if under_way < AHEAD:
                return True

    def _samples(self, host: StaticSamples, batch: Batch, marks: list[Mark]) -> list[Samples]:
        count, leaves = len(marks) - 1, batch.leaves
        tokens, scores, confidence = (
            part[:count, :leaves].tolist() for part in (host.tokens, host.scores, host.confidence)
        )
        entropy = host.entropy[:count, :leaves].tolist()
        rows = [len(batch), *[leaves] * (count - 1)]
        taken = [step_between(marks[i], marks[i + 1], rows[i], marks[0]) for i in range(count)]
        return [Samples(*each) for each in zip(tokens, scores, confidence, entropy, taken, strict=True)]

    # ---- Capturing

    def _captured(self, fits: bool, find: Callable[[], T]) -> T | None:
        """What `find` captures or has captured; None for a step that must run eagerly."""
        if self._failed or not fits or not self.model.cache.buffers.tensors():
            return None
        try:
            if self.model.cache is not self._cache:
                self._prepare()
            return find()
        except Exception as error:  # whatever a model's code or the device raises
            self._give_up(error)
            return None

    def _prepare(self) -> None:
        """Static memory for the model's cache."""
        self._forget()
        cache, where = self.model.cache, self.model.device
        rows, words = max(self.most_rows, DRAFT_ROWS[-1]), TREE_ROWS // WORD
        self.inputs = StaticInputs(rows, words, cache.buffers.capacity - 1, self.device, where)
        self._commit = StaticCommit(TREE_ROWS, self.device, where)
        self._cache = cache

    def _forget(self) -> None:
        """Let go of all graphs, and of the cache that they work on."""
        self._cache = None
        for graphs in (self._verifying, self._drafting, self._forwards, self._committing):
            graphs.clear()

    def _give_up(self, error: Exception) -> None:
        self._forget()
        self._failed, self.burst = True, EagerRunner.burst
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.note = f"eager: capture failed: {reason}"
        warnings.warn(f"{self.model.role}: steps are not captured any more: {reason}", RuntimeWarning, stacklevel=2)

    def _verify_graph(self) -> VerifyGraph:
        tap = self.model.tap  # without one, another graph: it keeps no hidden states
        if tap not in self._verifying:
            n, inputs, hidden = self.most_rows, self.inputs, list[Tensor]()
            host, kept = self.device.host_memory(n + 2), list[Tensor]()

            def run() -> None:
                given = inputs.of(n)
                logits = self.model.forward(given)
                verdict = verify(
                    logits,
                    given.ids,
                    inputs.parents[:n],
                    inputs.next_positions[:n],
                    seed=inputs.seed,
                    filters=inputs.filters,
                )
                result = torch.cat([verdict.accepted[None], verdict.next_token[None], verdict.path])
                host.copy_(result, non_blocking=True)
                hidden[:], kept[:] = self.model.hidden, [logits]  # of the run that is captured, which is the last

            graph = self._capture(run)
            self._verifying[tap] = VerifyGraph(graph, host, kept[0], hidden)
        return self._verifying[tap]

    def _draft_graphs(self, candidates: int, vocabulary: int, rows: Sequence[int]) -> DraftGraphs:
        key = candidates, vocabulary, self.model.first_in_window
        if key not in self._drafting:
            while len(self._drafting) >= KEPT:
                del self._drafting[next(iter(self._drafting))]
            self._drafting[key] = self._draft_memory(candidates, vocabulary)
        graphs = self._drafting[key]
        for n in {fitting(DRAFT_ROWS, count) for count in rows} - graphs.by_rows.keys():
            graphs.by_rows[n] = self._capture(partial(graphs.run, n))
        return graphs

    def _forward_graph(self, n: int) -> ForwardGraph:
        key = n, self.model.first_in_window
        if key not in self._forwards:
            kept = list[Tensor]()

            def run() -> None:
                kept[:] = [self.model.forward(self.inputs.of(n))]

            graph = self._capture(run)
            self._forwards[key] = ForwardGraph(graph, kept[0])
        return self._forwards[key]

    def _draft_memory(self, candidates: int, vocabulary: int) -> DraftGraphs:
        inputs, most = self.inputs, DRAFT_ROWS[-1]
        size = StaticSamples.words(most, candidates)
        with self.device.running():
            buffer = torch.zeros(size, dtype=torch.int64, device=self.model.device)
        samples = StaticSamples.within(buffer, most, candidates)
        host = StaticSamples.within(self.device.host_memory(size), most, candidates)

        def run(n: int) -> None:
            given = inputs.of(n)
            logits = self.model.forward(given)[:, :vocabulary]
            next_positions = inputs.next_positions[:n]
            sample = draft_sample(logits, next_positions, candidates, seed=inputs.seed, filters=inputs.filters)
            inputs.advance(n, sample, samples)

        return DraftGraphs(run, samples, host)

    def _commit_graph(self, count: int) -> Graph:
        size = fitting(COMMIT_ROWS, count)
        if size not in self._committing:
            buffers, static = self.model.cache.buffers.tensors(), self._commit
            static.fill([], 0)
            self._committing[size] = self._capture(lambda: kv_commit(buffers, static.rows[:size], static.start))
        return self._committing[size]

    @inference
    def _capture(self, run: Callable[[], None]) -> Graph:
        """Run once, over padding, so that whatever is set up lazily is there; then capture."""
        self.inputs.clear()
        with self.device.running():
            run()
        self.device.mark().wait()
        return self.device.capture(run)


def is_captured_alone(texts: Sequence[Judged] | Sequence[Leaves]) -> bool:
    return len(texts) == 1 and texts[0].batch.start == 0


def fitting(sizes: Sequence[int], n: int) -> int:
    """The smallest of `sizes`, in ascending order, that holds n."""
    return next(size for size in sizes if size >= n)
