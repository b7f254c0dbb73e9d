"""Step runners: one model's prefill, steps and commits, with the host told only what it needs.

A step is a forward with the op that reads its logits: `verify` for the target, `draft_sample` for the draft. The eager
runner calls the model; the captured one (graphs/runner.py) replays CUDA graphs. Both give the same results.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specbranch.core.messages import Step, Verdict
from specbranch.core.sampling import Sampling
from specbranch.runtime.batch import Batch, Inputs
from specbranch.runtime.cache import TREE_ROWS
from specbranch.runtime.device import Device, Host, Mark, step_between
from specbranch.runtime.model import CachedModel
from specbranch.runtime.modes import inference
from specbranch.stages import ShouldContinue
from specbranch_ext import draft_sample, verify

Guessed = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]


@dataclass(frozen=True, slots=True)
class Samples:
    """`draft_sample`'s results at the leaves of one step, as lists: [b][k], [b][k], [b][k], [b]."""

    tokens: list[list[int]]
    scores: list[list[float]]
    confidence: list[list[float]]
    entropy: list[float]
    step: Step


@dataclass(frozen=True, slots=True)
class PendingVerdict:
    """A verdict on its way to host memory: [accepted, next token, path …].

    hidden: what the model's tap saw, until the next step.
    """

    host: Tensor
    begin: Mark
    end: Mark
    rows: int
    hidden: list[Tensor]

    def done(self) -> bool:
        return self.end.done()

    def result(self) -> Verdict:
        """Wait for it. Raises ValueError for logits that cannot be sampled."""
        self.end.wait()
        accepted, next_token, *path = self.host.tolist()
        if next_token < 0:  # on a device, where a kernel cannot raise
            raise ValueError("target_logits: a row has NaN or +inf, or masks every token")
        return Verdict(tuple(path[:accepted]), next_token, step_between(self.begin, self.end, self.rows, self.begin))


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

    def done(self) -> bool:
        return self.end.done()

    def result(self) -> Verdict:
        """Wait for the logits, and walk. Raises what a rule raises, and ValueError for logits that cannot be
        sampled."""
        self.end.wait()
        path, next_token = self.walk(self.logits)
        walked = self.device.mark()
        walked.wait()
        return Verdict(path, next_token, step_between(self.begin, walked, len(self.logits), self.begin))


class Runner(Protocol):
    """Runs one model's work, in order."""

    model: CachedModel
    burst: int  # draft steps that are best asked for at once
    most_rows: int  # of a verification
    note: str  # "captured", or "eager" and why

    @property
    def device(self) -> Device: ...

    def another(self) -> Runner:
        """The same model on the same device, for another text."""

    def reset(self, tokens: int, text: Sequence[int] = ()) -> None:
        """Start a new text of at most `tokens` tokens, which begins with `text`; see CachedModel.reset. Raises
        SpecBranchError when it does not fit."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Commit a chain of tokens behind the prefix."""

    def verify(
        self,
        batch: Batch,
        parents: Sequence[int],
        sampling: Sampling,
        walk: Callable[[Tensor], Walked] | None = None,
    ) -> PendingVerdict | PendingWalk:
        """Start a step of the target. parents: of each row, -1 for the first. walk: what makes a verdict of its logits
        [n, V], in place of the op."""

    def draft(
        self,
        batch: Batch,
        candidates: int,
        vocabulary: int,
        sampling: Sampling,
        steps: int,
        should_continue: ShouldContinue,
        rules: Guessed | None = None,
    ) -> list[Samples]:
        """Steps of the draft: over the batch, then each over the first candidates of the one before, until there are
        `steps` of them or `should_continue`, asked before each but the first, says no. rules: what the logits of a step
        [b, V] become before they are sampled, given the tokens of this call behind each leaf."""

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
    def verify(
        self,
        batch: Batch,
        parents: Sequence[int],
        sampling: Sampling,
        walk: Callable[[Tensor], Walked] | None = None,
    ) -> PendingVerdict | PendingWalk:
        begin = self.device.mark()
        with self.device.running():
            inputs = Inputs.of(batch, self.model.device)
            logits = self.model.forward(inputs)
            if walk is not None:
                return PendingWalk(logits, walk, begin, self.device.mark(), self.device, self.model.hidden)
            verdict = verify(
                logits,
                inputs.ids,
                torch.tensor(parents, device=inputs.ids.device),
                inputs.positions + 1,
                **sampling.op_arguments,
            )
            result = torch.cat([verdict.accepted[None], verdict.next_token[None], verdict.path])
        host = self.device.host_memory(len(result))
        self.device.copy(host, result)
        return PendingVerdict(host, begin, self.device.mark(), len(batch), self.model.hidden)

    @inference
    def draft(
        self,
        batch: Batch,
        candidates: int,
        vocabulary: int,
        sampling: Sampling,
        steps: int,
        should_continue: ShouldContinue,
        rules: Guessed | None = None,
    ) -> list[Samples]:
        samples: list[Samples] = []
        behind: list[list[int]] = [[] for _ in range(batch.leaves)]
        while len(samples) < steps and (not samples or should_continue(0)):
            begin = self.device.mark()
            with self.device.running():
                inputs = Inputs.of(batch, self.model.device)
                logits = self.model.forward(inputs, keep=slice(batch.leaves))[:, :vocabulary]
                logits = logits if rules is None else rules(logits, behind)
                positions = inputs.positions[: batch.leaves] + 1
                sample = draft_sample(logits, positions, candidates, **sampling.op_arguments)
                tokens, scores, confidence, entropy = (part.tolist() for part in sample)
            took = step_between(begin, self.device.mark(), len(batch), begin)
            samples.append(Samples(tokens, scores, confidence, entropy, took))
            first = [row[0] for row in tokens]
            if min(first) < 0:
                break  # a row that cannot be sampled: nothing can follow it
            behind = [[*tokens, token] for tokens, token in zip(behind, first, strict=True)]
            batch = batch.below(first)
        return samples
