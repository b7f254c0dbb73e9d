"""The captured runner: one model's steps as CUDA graphs over static memory.

On a GPU a small model is bound by the launches of its kernels, so a forward called from Python costs as much as a large
model's. A graph is one launch. There is one for every kind of step and each of a few row counts; a batch takes the next
larger one, padded. A draft step writes the next step's batch itself, so that a burst of steps needs no host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from specbranch.batch import WORD, Batch
from specbranch.cache import TREE_ROWS, BranchCache
from specbranch.device import Graph, GraphDevice, Mark, step
from specbranch.features import FeatureTap
from specbranch.model import CachedModel
from specbranch.runner import DeviceJudgement, EagerRunner, Guesses, PendingJudgement, seen
from specbranch.sampling import Sampling
from specbranch.static import STEPS, StaticCommit, StaticGuesses, StaticInputs
from specbranch_ext import draft_sample, kv_commit, verify

T = TypeVar("T")

ROWS = (64, 32, 16, 8, 4, 2, 1)  # of the graphs; the largest is captured first, the others fit into its memory
KEPT = 4  # sets of graphs, by sampling parameters, that are kept
GRANULARITY = 1024  # of the cache's capacity: graphs are captured anew for another cache
AHEAD = 2  # draft steps that are enqueued at most: one runs, one waits


@dataclass(frozen=True)
class VerifyGraphs:
    """verify: forward and `verify`, the result copied to `host`: [accepted, next token, path …]. hidden: where each
    graph leaves what a tap saw."""

    by_rows: dict[int, Graph]
    host: torch.Tensor
    hidden: dict[int, list[torch.Tensor]]


@dataclass(frozen=True)
class DraftGraphs:
    """draft: forward, `draft_sample`, and the next step's batch. The results lie in `guesses`."""

    by_rows: dict[int, Graph]
    guesses: StaticGuesses
    host: StaticGuesses


class CapturedRunner:
    """Replays graphs; what no graph fits (a prompt, a batch beyond the largest) it leaves to the eager runner.

    The same results as the eager runner's: padding changes no row, and sampling is a function of the logits, the seed
    and the position. Of a batch only results travel to the host, in one copy for a verdict and one for a burst.
    """

    burst = STEPS
    note = "captured"

    def __init__(self, model: CachedModel, device: GraphDevice) -> None:
        self.model, self.device = model, device
        self.eager = EagerRunner(model, device)
        model.granularity = GRANULARITY
        self._cache: BranchCache | None = None
        self._verifying: dict[tuple[object, ...], VerifyGraphs] = {}
        self._drafting: dict[tuple[object, ...], DraftGraphs] = {}

    def prefill(self, tokens: Sequence[int]) -> None:
        self.eager.prefill(tokens)

    def verify(
        self, batch: Batch, parents: Sequence[int], sampling: Sampling, tap: FeatureTap | None = None
    ) -> PendingJudgement:
        if not self._ready(batch):
            return self.eager.verify(batch, parents, sampling, tap)
        graphs, rows = self._verify_graphs(sampling, tap), rows_for(len(batch))
        begin = self.device.mark()
        self.inputs.fill(batch, list(parents), sampling.seed)
        graphs.by_rows[rows].replay()
        return DeviceJudgement(graphs.host, begin, self.device.mark(), len(batch), graphs.hidden[rows])

    def draft(
        self,
        batch: Batch,
        candidates: int,
        vocabulary: int,
        sampling: Sampling,
        steps: int,
        going: Callable[[], bool],
    ) -> list[Guesses]:
        if not self._ready(batch):
            return self.eager.draft(batch, candidates, vocabulary, sampling, steps, going)
        graphs = self._draft_graphs(candidates, vocabulary, sampling)
        marks = [self.device.mark()]
        self.inputs.fill(batch, [], sampling.seed)
        graphs.by_rows[rows_for(len(batch))].replay()
        marks.append(self.device.mark())
        while len(marks) <= min(steps, STEPS) and self._turn(marks, going):
            graphs.by_rows[rows_for(batch.leaves)].replay()
            marks.append(self.device.mark())
        self.device.copy(graphs.host.buffer, graphs.guesses.buffer)
        arrived = self.device.mark()
        arrived.wait()
        return self._guesses(graphs.host, batch, marks)

    def commit(self, path: Sequence[int], survivors: Mapping[int, int]) -> None:
        cache = self.model.cache
        if cache is not self._cache:
            self.eager.commit(path, survivors)
            return
        start = cache.length
        if moved := cache.accept(path, survivors):
            self._commit.fill(moved, start)
            self._committing.replay()

    def _turn(self, marks: list[Mark], going: Callable[[], bool]) -> bool:
        """Wait until another step may be enqueued; False when there is to be none."""
        while going():
            if len(marks) <= AHEAD or marks[-AHEAD].done():
                return True
        return False

    def _guesses(self, host: StaticGuesses, batch: Batch, marks: list[Mark]) -> list[Guesses]:
        count, leaves = len(marks) - 1, batch.leaves
        tokens, scores, confidence = (
            part[:count, :leaves].tolist() for part in (host.tokens, host.scores, host.confidence)
        )
        entropy = host.entropy[:count, :leaves].tolist()
        rows = [len(batch), *[leaves] * (count - 1)]
        taken = [step(marks[i], marks[i + 1], rows[i], marks[0]) for i in range(count)]
        return [Guesses(*each) for each in zip(tokens, scores, confidence, entropy, taken, strict=True)]

    # ---- Capturing

    def _ready(self, batch: Batch) -> bool:
        """Whether a graph fits. Static memory is made anew when the cache was."""
        cache = self.model.cache
        if len(batch) > ROWS[0] or not cache.buffers():
            return False
        if cache is not self._cache:
            where, words = self.model.device, TREE_ROWS // WORD
            self._verifying.clear()
            self._drafting.clear()
            self.inputs = StaticInputs(ROWS[0], words, cache.capacity - 1, self.device, where)
            self._commit = StaticCommit(TREE_ROWS, self.device, where)
            self._committing = self._capture(self._run_commit)
            self._cache = cache
        return True

    def _run_commit(self) -> None:
        kv_commit(self.model.cache.buffers(), self._commit.rows, self._commit.start)

    def _verify_graphs(self, sampling: Sampling, tap: FeatureTap | None) -> VerifyGraphs:
        key = (tap, *sampling.filters)
        if key not in self._verifying:
            host = self.device.host_memory(ROWS[0] + 2)
            inputs, hidden = self.inputs, dict[int, list[torch.Tensor]]()

            def run(n: int) -> None:
                given = inputs.of(n)
                logits = self.model.forward(given)
                arguments = {**sampling.op_arguments, "seed": inputs.seed}
                verdict = verify(logits, given.ids, inputs.parents[:n], given.positions + 1, **arguments)
                result = torch.cat([verdict.accepted[None], verdict.next_token[None], verdict.path])
                host[: n + 2].copy_(result, non_blocking=True)
                hidden[n] = seen(tap)  # of the run that is captured, which is the last

            forget(self._verifying)
            self._verifying[key] = VerifyGraphs(self._capture_all(run), host, hidden)
        return self._verifying[key]

    def _draft_graphs(self, candidates: int, vocabulary: int, sampling: Sampling) -> DraftGraphs:
        key = (candidates, vocabulary, *sampling.filters)
        if key not in self._drafting:
            inputs, size = self.inputs, StaticGuesses.words(ROWS[0], candidates)
            buffer = torch.zeros(size, dtype=torch.int64, device=self.model.device)
            guesses = StaticGuesses.within(buffer, ROWS[0], candidates)
            host = StaticGuesses.within(self.device.host_memory(size), ROWS[0], candidates)

            def run(n: int) -> None:
                given = inputs.of(n)
                logits = self.model.forward(given)[:, :vocabulary]
                arguments = {**sampling.op_arguments, "seed": inputs.seed}
                sample = draft_sample(logits, given.positions + 1, candidates, **arguments)
                guesses.write(inputs.slot, n, sample)
                inputs.go_below(n, sample.tokens[:, 0].clamp(min=0))

            forget(self._drafting)
            self._drafting[key] = DraftGraphs(self._capture_all(run), guesses, host)
        return self._drafting[key]

    def _capture_all(self, run: Callable[[int], None]) -> dict[int, Graph]:
        return {n: self._capture(partial(run, n)) for n in ROWS}

    def _capture(self, run: Callable[[], None]) -> Graph:
        """Run once, over padding, so that whatever is set up lazily is there; then capture."""
        with torch.inference_mode():
            self.inputs.clear()
            with self.device.running():
                run()
            self.device.mark().wait()
            return self.device.capture(run)


def rows_for(n: int) -> int:
    """The smallest graph that holds n rows."""
    return min(rows for rows in ROWS if rows >= n)


def forget(graphs: dict[tuple[object, ...], T]) -> None:
    """Make room for one more set of graphs: the oldest goes."""
    while len(graphs) >= KEPT:
        del graphs[next(iter(graphs))]
