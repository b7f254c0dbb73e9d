"""Captured steps that several texts share: a graph for each size of the rows of all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from specbranch.core.sampling import Sampling
from specbranch.runtime.batch import WORD, Batch, Inputs, pack
from specbranch.runtime.cache import TREE_ROWS, BranchCache, Buffers
from specbranch.runtime.device import Device, Graph, GraphDevice, step_between
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.model import CachedModel
from specbranch.runtime.modes import inference
from specbranch.runtime.runner import (
    EagerRunner,
    Judged,
    Leaves,
    PendingVerdict,
    PendingWalk,
    Samples,
    drafted_anew,
    judged_anew,
    spans_of,
)
from specbranch.stages import ShouldContinue
from specbranch_ext import draft_sample, verify

T = TypeVar("T")

TEXTS = 32  # that share a step at most
ROWS = (8, 16, 32, 64, 128, 256)
COLUMNS = 7  # of StaticTexts
KEPT = 8  # graphs of draft steps that are kept


class StaticTexts:
    """Rows of several texts and how they are sampled, in device memory, in one buffer.

    ids, positions, next_positions, rows, parents, sequence, seeds: int64 [R]. ancestors: int64 [R, words]. filters:
    float64 [R, 4]. starts, prefix, roots: int64 [TEXTS + 1]; see `tree_attention` and `verify`. The last text is
    nobody's: rows without a token (padding) are its, are written to the buffers' last row and see only that.
    """

    def __init__(self, rows: int, words: int, spare: int, device: Device, where: torch.device) -> None:
        self.spare, self.words = spare, words
        self._device = device
        texts = TEXTS + 1
        sizes = COLUMNS * rows, words * rows, 4 * rows, 3 * texts
        self._host = device.host_memory(sum(sizes))
        with device.running():
            buffer = self._buffer = torch.zeros(sum(sizes), dtype=torch.int64, device=where)
        columns, bits, filters, of_texts = buffer.split(sizes)
        self.ids, self.positions, self.next_positions, self.rows, self.parents, self.sequence, self.seeds = (
            columns.view(COLUMNS, rows)
        )
        self.ancestors, self.filters = bits.view(rows, words), filters.view(torch.float64).view(rows, 4)
        self.starts, self.prefix, self.roots = of_texts.view(3, texts)
        columns, bits, filters, of_texts = self._host.split(sizes)
        self._columns, self._bits = columns.view(COLUMNS, rows).numpy(), bits.view(rows, words).numpy()
        self._filters = filters.view(torch.float64).view(rows, 4).numpy()
        self._texts = of_texts.view(3, texts).numpy()
        self._read = device.mark()

    def fill(
        self, batches: Sequence[Batch], samplings: Sequence[Sampling], parents: Sequence[Sequence[int]] = ()
    ) -> None:
        """Enqueue some texts' batches. parents: as in Judged, of a verification."""
        self._read.wait()  # the one before has left the host's memory
        ids, positions, next_positions, rows, above, sequence, seeds = self._columns
        starts, prefix, roots = self._texts
        starts[:], prefix[:], roots[:] = self.spare, 0, -1
        first = 0
        for text, (batch, sampling) in enumerate(zip(batches, samplings, strict=True)):
            end = first + len(batch)
            ids[first:end], positions[first:end] = batch.tokens, batch.positions
            rows[first:end] = [batch.start + row for row in batch.rows]
            sequence[first:end], seeds[first:end], self._filters[first:end] = text, sampling.seed, sampling.filters
            above[first:end] = [first + parent if parent >= 0 else -1 for parent in parents[text]] if parents else -1
            self._bits[first:end] = pack(batch.ancestors, self.words)
            starts[text], prefix[text], roots[text] = batch.start, batch.prefix, first
            first = end
        ids[first:], positions[first:], rows[first:], above[first:] = 0, 0, self.spare, -1
        sequence[first:], seeds[first:], self._filters[first:] = TEXTS, 0, (0.0, 0.0, 1.0, 0.0)
        self._bits[first:], self._bits[first:, 0] = 0, 1
        next_positions[:] = positions + 1
        self._device.copy(self._buffer, self._host)
        self._read = self._device.mark()

    def of(self, n: int) -> Inputs:
        """The first n rows, as a model is called with them."""
        return Inputs(
            self.ids[:n],
            self.positions[:n],
            self.rows[:n],
            self.prefix,
            self.ancestors[:n],
            self.starts,
            self.sequence[:n],
        )


@dataclass(frozen=True)
class VerifyGraph:
    """Forward and `verify`; see PendingVerdict for `host`. logits, hidden: until the next replay."""

    graph: Graph
    host: Tensor
    logits: Tensor
    hidden: list[Tensor]


@dataclass(frozen=True)
class DraftGraph:
    """Forward and `draft_sample`. host: tokens [n, k], then scores and confidence [n, k] and entropy [n] as float64."""

    graph: Graph
    host: Tensor


@dataclass(frozen=True)
class ForwardGraph:
    """A forward alone, for rows that the host is asked about: a grammar's masks. logits: [n, V], until the next
    replay."""

    graph: Graph
    logits: Tensor


class TextGraphs:
    """The graphs over some buffers. failed: why there are none any more."""

    def __init__(self, buffers: Buffers, device: GraphDevice, where: torch.device) -> None:
        self.device, self.failed = device, ""
        self._buffers = buffers
        self.static = StaticTexts(ROWS[-1], TREE_ROWS // WORD, buffers.capacity - 1, device, where)
        self._verifying: dict[tuple[FeatureTap | None, int], VerifyGraph] = {}
        self._drafting: dict[tuple[int, int, int], DraftGraph] = {}
        self._forwards: dict[int, ForwardGraph] = {}

    def verifying(self, model: CachedModel, rows: int) -> VerifyGraph | None:
        """None where there is none for so many rows. model: of any of the texts."""
        n = fitting(rows)
        return self._captured(n, lambda: self._verify_graph(model, n))

    def drafting(self, model: CachedModel, rows: int, candidates: int, vocabulary: int) -> DraftGraph | None:
        n = fitting(rows)
        return self._captured(n, lambda: self._draft_graph(model, n, candidates, vocabulary))

    def forward(self, model: CachedModel, rows: int) -> ForwardGraph | None:
        n = fitting(rows)
        return self._captured(n, lambda: self._forward_graph(model, n))

    def _captured(self, n: int, find: Callable[[], T]) -> T | None:
        if self.failed or not n or not self._buffers.tensors():
            return None
        try:
            return find()
        except Exception as error:  # whatever a model's code or the device raises
            self.failed = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._verifying.clear()
            self._drafting.clear()
            self._forwards.clear()
            warnings.warn(f"steps are not captured any more: {self.failed}", RuntimeWarning, stacklevel=2)
            return None

    def _verify_graph(self, model: CachedModel, n: int) -> VerifyGraph:
        key = model.tap, n  # without a tap, another graph: it keeps no hidden states
        if key not in self._verifying:
            static, kept, hidden = self.static, list[Tensor](), list[Tensor]()
            host = self.device.host_memory(2 * len(static.roots) + n)

            def run() -> None:
                logits = model.forward(static.of(n))
                verdict = verify(
                    logits,
                    static.ids[:n],
                    static.parents[:n],
                    static.next_positions[:n],
                    seed=static.seeds[:n],
                    filters=static.filters[:n],
                    roots=static.roots,
                )
                host.copy_(torch.cat([verdict.accepted, verdict.next_token, verdict.path]), non_blocking=True)
                hidden[:], kept[:] = model.hidden, [logits]  # of the run that is captured, which is the last

            graph = self._capture(run)
            self._verifying[key] = VerifyGraph(graph, host, kept[0], hidden)
        return self._verifying[key]

    def _draft_graph(self, model: CachedModel, n: int, candidates: int, vocabulary: int) -> DraftGraph:
        key = n, candidates, vocabulary
        if key not in self._drafting:
            while len(self._drafting) >= KEPT:
                del self._drafting[next(iter(self._drafting))]
            static, host = self.static, self.device.host_memory(n * (3 * candidates + 1))

            def run() -> None:
                logits = model.forward(static.of(n))[:, :vocabulary]
                sample = draft_sample(
                    logits,
                    static.next_positions[:n],
                    candidates,
                    seed=static.seeds[:n],
                    filters=static.filters[:n],
                )
                numbers = torch.cat([sample.scores.flatten(), sample.confidence.flatten(), sample.entropy])
                found = torch.cat([sample.tokens.flatten(), numbers.double().view(torch.int64)])
                host.copy_(found, non_blocking=True)

            self._drafting[key] = DraftGraph(self._capture(run), host)
        return self._drafting[key]

    def _forward_graph(self, model: CachedModel, n: int) -> ForwardGraph:
        if n not in self._forwards:
            kept = list[Tensor]()

            def run() -> None:
                kept[:] = [model.forward(self.static.of(n))]

            graph = self._capture(run)
            self._forwards[n] = ForwardGraph(graph, kept[0])
        return self._forwards[n]

    @inference
    def _capture(self, run: Callable[[], None]) -> Graph:
        """Run once, over padding, so that whatever is set up lazily is there; then capture."""
        self.static.fill([], [])
        with self.device.running():
            run()
        self.device.mark().wait()
        return self.device.capture(run)


class SharingRunner:
    """Replays the graphs of the buffers that its text has rows in; what no graph fits (a prompt, more rows than the
    largest) it leaves to the eager runner. The same results as the eager runner's, but for what the number of rows
    makes of a matrix product's last bits on a GPU. Draft steps come one by one."""

    burst = 1
    most_rows = 32  # of a text, as where it is verified alone

    def __init__(self, model: CachedModel, device: GraphDevice, graphs: TextGraphs) -> None:
        self.model, self.device, self.graphs = model, device, graphs
        self.eager = EagerRunner(model, device)

    @property
    def note(self) -> str:
        return f"eager: capture failed: {self.graphs.failed}" if self.graphs.failed else "captured"

    def another(self) -> EagerRunner:
        return EagerRunner(self.model.another(), self.device, "a text apart from those that share their steps")

    def beside(self, cache: BranchCache) -> SharingRunner:
        return SharingRunner(self.model.another(cache), self.device, self.graphs)

    def reset(self, tokens: int, text: Sequence[int] = ()) -> None:
        self.eager.reset(tokens, text)

    def prefill(self, tokens: Sequence[int]) -> None:
        self.eager.prefill(tokens)

    def commit(self, path: Sequence[int], survivors: Mapping[int, int]) -> None:
        self.eager.commit(path, survivors)

    def verify(self, texts: Sequence[Judged]) -> Sequence[PendingVerdict | PendingWalk]:
        batches = [text.batch for text in texts]
        spans = spans_of([len(batch) for batch in batches])
        rows = spans[-1].stop
        found = self.graphs.verifying(self.model, rows) if fits(texts) else None
        if found is None:
            return self.eager.verify(texts)
        begin, static = self.device.mark(), self.graphs.static
        static.fill(batches, [text.sampling for text in texts], [text.parents for text in texts])
        found.graph.replay()
        host, places = found.host, len(static.roots)
        if any(text.allowed is not None and text.walk is None for text in texts):
            host, places = judged_anew(self.device, found.logits[:rows], static.of(rows), texts, spans), len(texts)
        done = self.device.mark()
        pending: list[PendingVerdict | PendingWalk] = []
        for place, (text, span) in enumerate(zip(texts, spans, strict=True)):
            hidden = [each[span] for each in found.hidden]
            if text.walk is None:
                pending.append(PendingVerdict(host, begin, done, hidden, places, place, span.start, rows))
            else:
                pending.append(PendingWalk(found.logits[span], text.walk, begin, done, self.device, hidden, rows))
        return pending

    def draft(
        self,
        texts: Sequence[Leaves],
        candidates: int,
        vocabulary: int,
        steps: int,
        should_continue: ShouldContinue,
    ) -> list[list[Samples]]:
        batches = [text.batch for text in texts]
        spans = spans_of([len(batch) for batch in batches])
        rows = spans[-1].stop
        able = steps == 1 and fits(texts) and all(text.rules is None for text in texts)  # a graph cannot ask the host
        if able and any(text.allowed is not None for text in texts):
            if (forward := self.graphs.forward(self.model, rows)) is None:
                return self.eager.draft(texts, candidates, vocabulary, steps, should_continue)
            begin = self.device.mark()
            self.graphs.static.fill(batches, [text.sampling for text in texts])
            forward.graph.replay()
            return drafted_anew(self.device, forward.logits[:, :vocabulary], begin, texts, candidates, spans)
        found = self.graphs.drafting(self.model, rows, candidates, vocabulary) if able else None
        if found is None:
            return self.eager.draft(texts, candidates, vocabulary, steps, should_continue)
        begin = self.device.mark()
        self.graphs.static.fill(batches, [text.sampling for text in texts])
        found.graph.replay()
        done = self.device.mark()
        done.wait()
        count = len(found.host) // (3 * candidates + 1) * candidates
        floats = found.host[count:].view(torch.float64)
        tokens, scores, confidence = (
            part.view(-1, candidates).tolist()
            for part in (found.host[:count], floats[:count], floats[count : 2 * count])
        )
        entropy = floats[2 * count :].tolist()
        took = step_between(begin, done, rows, begin)
        leaves = [slice(span.start, span.start + batch.leaves) for span, batch in zip(spans, batches, strict=True)]
        return [[Samples(tokens[of], scores[of], confidence[of], entropy[of], took)] for of in leaves]


def fits(texts: Sequence[Judged] | Sequence[Leaves]) -> bool:
    """Whether a graph can run them: it has numbers of its own for where a window ends at a gap."""
    return len(texts) <= TEXTS and not any(text.model.first_in_window for text in texts)


def fitting(rows: int) -> int:
    """The size of the graph that holds so many; 0 where there is none."""
    return next((size for size in ROWS if size >= rows), 0)
