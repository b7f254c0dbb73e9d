"""Step runners: one model's prefill, steps and commits, with the host told only what it needs.

A step is a forward with the op that reads its logits: `verify` for the target, `draft_sample` for the draft. Several
texts may share it. The eager runner calls the model; the captured one (graphs/runner.py) replays CUDA graphs. Both give
the same results.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from specbranch.core.messages import Step, Verdict
from specbranch.core.sampling import Sampling
from specbranch.runtime.batch import Batch, Inputs
from specbranch.runtime.cache import TREE_ROWS, BranchCache
from specbranch.runtime.device import Device, Host, Mark, step_between
from specbranch.runtime.model import CachedModel
from specbranch.runtime.modes import inference
from specbranch.stages import ShouldContinue
from specbranch_ext import DraftSample, draft_sample, verify

Guessed = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]
AllowedBehind = Callable[[Sequence[Sequence[int]]], list[bytes]]


@dataclass(frozen=True, slots=True)
class Leaves:
    """One text's part of some draft steps.

    rules: what the logits of a step [b, V] become before they are sampled, given the tokens of this call behind each
    leaf. allowed: the masks of a step's rows, given the same.
    """

    model: CachedModel
    batch: Batch
    sampling: Sampling
    rules: Guessed | None = None
    allowed: AllowedBehind | None = None


@dataclass(frozen=True, slots=True)
class Samples:
    """`draft_sample`'s results at one text's leaves in one step, as lists: [b][k], [b][k], [b][k], [b]. A row that
    cannot be sampled has tokens -1. step: with the rows of all texts."""

    tokens: list[list[int]]
    scores: list[list[float]]
    confidence: list[list[float]]
    entropy: list[float]
    step: Step

    def best(self, k: int) -> Samples:
        """The first k candidates of each leaf: another text of the step may have wanted more."""
        if len(self.tokens[0]) <= k:
            return self
        tokens, scores = [row[:k] for row in self.tokens], [row[:k] for row in self.scores]
        return Samples(tokens, scores, [row[:k] for row in self.confidence], self.entropy, self.step)


@dataclass(frozen=True, slots=True)
class PendingVerdict:
    """A verdict on its way to host memory.

    host: of all `texts` of the step, accepted of each, then the next token of each, then the path of each, which begins
    at its first row. text, first, rows: which one it is, and its rows. hidden: what the model's tap saw at these, until
    the next step.
    """

    host: Tensor
    begin: Mark
    end: Mark
    hidden: list[Tensor]
    texts: int = 1
    text: int = 0
    first: int = 0
    rows: int | None = None

    def done(self) -> bool:
        return self.end.done()

    def result(self) -> Verdict:
        """Wait for it. Raises ValueError for logits that cannot be sampled."""
        self.end.wait()
        accepted, next_token = self.host[self.text :: self.texts][:2].tolist()
        if next_token < 0:  # on a device, or beside other texts, where the op does not raise
            raise ValueError("target_logits: a row has NaN or +inf, or masks every token")
        begin = 2 * self.texts + self.first
        path = (self.host[begin : begin + accepted] - self.first).tolist()
        rows = len(self.host) - 2 * self.texts if self.rows is None else self.rows
        return Verdict(tuple(path), next_token, step_between(self.begin, self.end, rows, self.begin))


Walked = tuple[tuple[int, ...], int]
"""The accepted places of a trunk, and the token behind them."""


@dataclass(frozen=True, slots=True)
class PendingWalk:
    """A verdict that is reached one token after the other, from logits that are on their way."""

    logits: Tensor
    walk: Callable[[Tensor], Walked]
    begin: Mark
    end: Mark
    device: Device
    hidden: list[Tensor]
    rows: int

    def done(self) -> bool:
        return self.end.done()

    def result(self) -> Verdict:
        """Wait for the logits, and walk. Raises what a rule raises, and ValueError for logits that cannot be
        sampled."""
        self.end.wait()
        path, next_token = self.walk(self.logits)
        walked = self.device.mark()
        walked.wait()
        return Verdict(path, next_token, step_between(self.begin, walked, self.rows, self.begin))


@dataclass(frozen=True, slots=True)
class Judged:
    """One text's part of a step of the target. parents: of each row, -1 for the first. walk: what makes a verdict of
    its logits [n, V], in place of the op. allowed: the masks of its rows; asked for once the model is on its way."""

    model: CachedModel
    batch: Batch
    parents: Sequence[int]
    sampling: Sampling
    walk: Callable[[Tensor], Walked] | None = None
    allowed: Callable[[], list[bytes]] | None = None


class Runner(Protocol):
    """Runs one model's work, in order."""

    model: CachedModel
    burst: int  # draft steps that are best asked for at once
    most_rows: int  # of a verification

    @property
    def note(self) -> str:
        """ "captured", or "eager" and why."""

    @property
    def device(self) -> Device: ...

    def another(self) -> Runner:
        """The same model on the same device, for another text."""

    def beside(self, cache: BranchCache) -> Runner:
        """The same again for another text in these buffers, which may share steps."""

    def reset(self, tokens: int, text: Sequence[int] = ()) -> None:
        """Start a new text of at most `tokens` tokens, which begins with `text`; see CachedModel.reset. Raises
        SpecBranchError when it does not fit."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Commit a chain of tokens behind the prefix."""

    def verify(self, texts: Sequence[Judged]) -> Sequence[PendingVerdict | PendingWalk]:
        """Start a step of the target; a verdict for each text. `texts` have the same buffers, and join."""

    def draft(
        self,
        texts: Sequence[Leaves],
        candidates: int,
        vocabulary: int,
        steps: int,
        should_continue: ShouldContinue,
    ) -> list[list[Samples]]:
        """Steps of the draft, for each text: over its batch, then each over the first candidates of the one before,
        until there are `steps` of them or `should_continue`, asked before each but the first, says no."""

    def commit(self, path: Sequence[int], survivors: Mapping[int, int]) -> None:
        """See BranchCache.commit."""


class EagerRunner:
    """Calls the model from Python, step by step."""

    burst = 1
    most_rows = TREE_ROWS

    def __init__(self, model: CachedModel, device: Device | None = None, reason: str = "") -> None:
        """reason: why the steps are not captured, where they might be."""
        self.model = model
        self.note = f"eager: {reason}" if reason else "eager"
        self.device: Device = Host() if device is None else device

    def another(self) -> EagerRunner:
        fresh = copy.copy(self)
        fresh.model = self.model.another()
        return fresh

    def beside(self, cache: BranchCache) -> EagerRunner:
        fresh = copy.copy(self)
        fresh.model = self.model.another(cache)
        return fresh

    def reset(self, tokens: int, text: Sequence[int] = ()) -> None:
        with self.device.running() if self.model.kept else nullcontext():  # which may have to be copied
            self.model.reset(tokens, text)

    def prefill(self, tokens: Sequence[int]) -> None:
        with self.device.running():
            self.model.prefill(tokens)

    def commit(self, path: Sequence[int], survivors: Mapping[int, int]) -> None:
        with self.device.running():
            self.model.cache.commit(path, survivors)

    @inference
    def verify(self, texts: Sequence[Judged]) -> Sequence[PendingVerdict | PendingWalk]:
        begin = self.device.mark()
        with self.device.running():
            inputs, logits, spans = self._forward([(text.model, text.batch) for text in texts])
            hidden = texts[0].model.hidden
            result = judged(logits, inputs, texts, spans)
        host = self.device.host_memory(len(result))
        self.device.copy(host, result)
        end, rows = self.device.mark(), len(logits)
        return [
            PendingVerdict(host, begin, end, [each[span] for each in hidden], len(texts), place, span.start, rows)
            if text.walk is None
            else PendingWalk(logits[span], text.walk, begin, end, self.device, [each[span] for each in hidden], rows)
            for place, (text, span) in enumerate(zip(texts, spans, strict=True))
        ]

    @inference
    def draft(
        self,
        texts: Sequence[Leaves],
        candidates: int,
        vocabulary: int,
        steps: int,
        should_continue: ShouldContinue,
    ) -> list[list[Samples]]:
        samples: list[list[Samples]] = [[] for _ in texts]
        batches = [text.batch for text in texts]
        behind: list[list[list[int]]] = [[[] for _ in range(batch.leaves)] for batch in batches]
        for step in range(steps):
            if step and not should_continue(0):
                break
            begin = self.device.mark()
            with self.device.running():
                parts = [(text.model, batch) for text, batch in zip(texts, batches, strict=True)]
                inputs, logits, spans = self._forward(parts, leaves_only=True)
                logits = logits[:, :vocabulary]
                logits = guessed(logits, texts, behind, spans)
                leaves = leaf_rows(batches, inputs.ids.device)
                positions = inputs.positions[leaves] + 1
                allowed = allowed_behind(texts, behind, spans, logits)
                sample = sampled(logits, positions, candidates, texts, spans, allowed)
                tokens, scores, confidence, entropy = (part.tolist() for part in sample)
            took = step_between(begin, self.device.mark(), sum(map(len, batches)), begin)
            for found, span in zip(samples, spans, strict=True):
                found.append(Samples(tokens[span], scores[span], confidence[span], entropy[span], took))
            first = [row[0] for row in tokens]
            if min(first) < 0:
                break  # a row that cannot be sampled: nothing can follow it
            behind = [
                [[*tail, token] for tail, token in zip(tails, first[span], strict=True)]
                for tails, span in zip(behind, spans, strict=True)
            ]
            batches = [batch.below(first[span]) for batch, span in zip(batches, spans, strict=True)]
        return samples

    def _forward(
        self, texts: Sequence[tuple[CachedModel, Batch]], leaves_only: bool = False
    ) -> tuple[Inputs, Tensor, list[slice]]:
        """A forward over some texts' batches: its logits, and which of them are whose."""
        (model, _), *others = texts
        batches = [batch for _, batch in texts]
        inputs = Inputs.of(batches, model.device)
        keep = leaf_rows(batches, model.device) if leaves_only else slice(None)
        logits = model.forward(inputs, keep=keep, beside=[other for other, _ in others])
        return inputs, logits, spans_of([batch.leaves if leaves_only else len(batch) for batch in batches])


def leaf_rows(batches: Sequence[Batch], device: torch.device) -> slice | Tensor:
    """Which rows of a forward are leaves."""
    if len(batches) == 1:
        return slice(batches[0].leaves)
    if all(len(batch) == batch.leaves for batch in batches):
        return slice(None)
    spans = spans_of([len(batch) for batch in batches])
    rows = [span.start + leaf for span, batch in zip(spans, batches, strict=True) for leaf in range(batch.leaves)]
    return torch.tensor(rows, device=device)


def spans_of(counts: Sequence[int]) -> list[slice]:
    """Which rows are whose, of texts with so many each."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


def judged(logits: Tensor, inputs: Inputs, texts: Sequence[Judged], spans: Sequence[slice]) -> Tensor:
    """What PendingVerdict takes: accepted and next token of each text, and their paths, int64 [2s + n]."""
    device, positions = logits.device, inputs.positions + 1
    if len(texts) == 1:
        text = texts[0]
        if text.walk is not None:
            return positions[:0]
        parents = torch.tensor(text.parents, device=device)
        allowed = allowed_of(texts, spans, logits)
        verdict = verify(logits, inputs.ids, parents, positions, **text.sampling.op_arguments, allowed=allowed)
        return torch.cat([verdict.accepted[None], verdict.next_token[None], verdict.path])
    above = [
        parent if parent < 0 else span.start + parent
        for text, span in zip(texts, spans, strict=True)
        for parent in text.parents
    ]
    verdict = verify(
        logits,
        inputs.ids,
        torch.tensor(above, device=device),
        positions,
        **sampling_of_rows([text.sampling for text in texts], spans, device),
        allowed=allowed_of(texts, spans, logits),
        roots=torch.tensor([span.start for span in spans], device=device),
    )
    return torch.cat([verdict.accepted, verdict.next_token, verdict.path])


@inference
def judged_anew(
    device: Device, logits: Tensor, inputs: Inputs, texts: Sequence[Judged], spans: Sequence[slice]
) -> Tensor:
    """Under masks, which the host knows while the model is on its way: what PendingVerdict takes, in host memory."""
    with device.running():
        result = judged(logits, inputs, texts, spans)
    host = device.host_memory(len(result))
    device.copy(host, result)
    return host


@inference
def drafted_anew(
    device: Device,
    logits: Tensor,
    begin: Mark,
    texts: Sequence[Leaves],
    candidates: int,
    spans: Sequence[slice],
) -> list[list[Samples]]:
    """The same of a draft step that began at a mark. spans: of all rows of each text, its leaves first."""
    batches = [text.batch for text in texts]
    leaves = spans_of([batch.leaves for batch in batches])
    with device.running():
        rows = torch.cat(
            [logits[span.start : span.start + batch.leaves] for span, batch in zip(spans, batches, strict=True)]
        )
        ahead = [position + 1 for batch in batches for position in batch.positions[: batch.leaves]]
        positions = torch.tensor(ahead, device=logits.device)
        behind: list[list[list[int]]] = [[[] for _ in range(batch.leaves)] for batch in batches]
        allowed = allowed_behind(texts, behind, leaves, rows)
        sample = sampled(rows, positions, candidates, texts, leaves, allowed)
        tokens, scores, confidence, entropy = (part.tolist() for part in sample)
    took = step_between(begin, device.mark(), sum(map(len, batches)), begin)
    return [[Samples(tokens[of], scores[of], confidence[of], entropy[of], took)] for of in leaves]


def sampling_of_rows(samplings: Sequence[Sampling], spans: Sequence[slice], device: torch.device) -> dict[str, Any]:
    """seed and filters of each row, as the ops take them."""
    rows = [sampling for sampling, span in zip(samplings, spans, strict=True) for _ in range(span.start, span.stop)]
    return {
        "seed": torch.tensor([sampling.seed for sampling in rows], device=device),
        "filters": torch.tensor([sampling.filters for sampling in rows], dtype=torch.float64, device=device),
    }


def guessed(
    logits: Tensor, texts: Sequence[Leaves], behind: Sequence[Sequence[Sequence[int]]], spans: Sequence[slice]
) -> Tensor:
    """The logits under each text's rules."""
    if all(text.rules is None for text in texts):
        return logits
    parts = [
        logits[span] if text.rules is None else text.rules(logits[span], tails)
        for text, tails, span in zip(texts, behind, spans, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    wide = max(part.shape[1] for part in parts)
    return torch.cat([pad(part.float(), (0, wide - part.shape[1]), value=-torch.inf) for part in parts])


def sampled(
    logits: Tensor,
    positions: Tensor,
    candidates: int,
    texts: Sequence[Leaves],
    spans: Sequence[slice],
    allowed: Tensor | None,
) -> DraftSample:
    """`draft_sample` for each text's leaves. allowed: see allowed_behind."""
    if len(texts) == 1:
        return draft_sample(logits, positions, candidates, **texts[0].sampling.op_arguments, allowed=allowed)
    of_rows = sampling_of_rows([text.sampling for text in texts], spans, logits.device)
    return draft_sample(logits, positions, candidates, **of_rows, allowed=allowed)


def allowed_of(texts: Sequence[Judged], spans: Sequence[slice], logits: Tensor) -> Tensor | None:
    """The target's argument `allowed`, where a text has masks; one that walks sees to its own."""
    asked = [None if text.walk is not None else text.allowed for text in texts]
    return _masks([None if ask is None else ask() for ask in asked], spans, logits)


def allowed_behind(
    texts: Sequence[Leaves], behind: Sequence[Sequence[Sequence[int]]], spans: Sequence[slice], logits: Tensor
) -> Tensor | None:
    """The same for a step of the draft."""
    asked = [text.allowed for text in texts]
    return _masks([ask and ask(tails) for ask, tails in zip(asked, behind, strict=True)], spans, logits)


def _masks(masks: Sequence[list[bytes] | None], spans: Sequence[slice], logits: Tensor) -> Tensor | None:
    """As the ops take them, int32 [n, words]: of a text without masks all bits are set."""
    if all(mask is None for mask in masks):
        return None
    vocabulary = logits.shape[1]
    words = (vocabulary + 31) // 32
    all_set = b"\xff" * (4 * words)
    rows = [
        # A draft with fewer tokens may have none to propose; logits behind a vocabulary are of no token.
        row[: 4 * words].ljust(4 * words, b"\0") if any_within(row, vocabulary) else all_set
        for mask, span in zip(masks, spans, strict=True)
        for row in (mask or [all_set] * (span.stop - span.start))
    ]
    data = np.frombuffer(bytearray().join(rows), dtype="<i4").reshape(len(rows), words)
    return torch.from_numpy(data).to(logits.device)


def any_within(mask: bytes, vocabulary: int) -> bool:
    """Whether one of the first tokens may follow."""
    first = len(mask) - len(mask.lstrip(b"\0"))
    if first >= len(mask):
        return False
    return 8 * first + (mask[first] & -mask[first]).bit_length() <= vocabulary
