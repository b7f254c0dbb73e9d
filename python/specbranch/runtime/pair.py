"""The two models of an engine, what each generation has of its own over their weights, and how they run at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import torch
from transformers import PreTrainedModel

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.attach import Attachment, forked
from specbranch.runtime.graphs.runner import CapturedRunner
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.kept import LEAST
from specbranch.runtime.locks import Lock, locked
from specbranch.runtime.model import CachedModel
from specbranch.runtime.placement import make_runner, make_workers
from specbranch.runtime.rows.probe import row_dependence
from specbranch.runtime.runner import Runner
from specbranch.runtime.weights import check_weights, parameters_of_forward

KEPT = 2  # slots of generations that are over


@dataclass(eq=False)
class Slot:
    """What one generation has for itself: a runner for each model, with its cache, and what reads the target's
    features."""

    target: Runner
    draft: Runner | None
    _tap: FeatureTap | None = None
    _owner: ref[object] | None = None
    used: int = 0  # when, in takes of the pair

    @property
    def free(self) -> bool:
        """Nobody has it, or whoever had it is gone: an interrupt may come before a slot is known to its owner."""
        return self._owner is None or self._owner() is None

    @property
    def tap(self) -> FeatureTap:
        """What a learned predictor reads of the target."""
        if self._tap is None:
            self._tap = FeatureTap(self.target.model.model)
        return self._tap

    @property
    def vocabulary(self) -> int:
        """The target's."""
        size: int = self.target.model.vocabulary
        return size

    def need_draft(self, what: str) -> Runner:
        """The draft. Raises SpecBranchError where there is none."""
        if self.draft is None:
            raise SpecBranchError(f"{what} needs a draft model: pass draft=, or retrieval=True to do without")
        return self.draft

    def reset(self, text: Sequence[int], tokens: int, draft: bool = True) -> None:
        """Start a text of at most `tokens` tokens, which begins with `text`. The draft makes room when it reads. Raises
        SpecBranchError when it does not fit."""
        self.target.reset(tokens, text[:-1])
        if draft and self.draft is not None:
            self.draft.model.check(tokens)

    @property
    def keeps(self) -> int:
        """Tokens that the target keeps of the text before."""
        kept = self.target.model.kept
        return 0 if kept is None else len(kept.tokens)

    def adopt(self, other: Slot, text: Sequence[int]) -> None:
        """Keep what another slot keeps of a text."""
        for mine, theirs in ((self.target, other.target), (self.draft, other.draft)):
            if mine is not None and theirs is not None:
                with mine.device.running():
                    mine.model.adopt(theirs.model, text)

    def forget(self) -> None:
        """Keep nothing of the text before."""
        for runner in (self.target, self.draft):
            if runner is not None:
                runner.model.kept = None

    def forget_stale(self) -> None:
        """See CachedModel.forget_stale."""
        for runner in (self.target, self.draft):
            if runner is not None:
                runner.model.forget_stale()

    def another(self) -> Slot:
        """The same models with caches of their own."""
        return Slot(self.target.another(), None if self.draft is None else self.draft.another())


class Pair:
    """A target and, but for autoregressive decoding, a draft.

    first: the slot that a generation gets when it is the only one; its runners are `target` and `draft`.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None,
        threads: int | None = None,
        target_threads: int | None = None,
        cuda_graphs: bool = True,
        priority: str = "target",
        prompt_cache: int = 0,
    ) -> None:
        """See SpecBranch.__init__. Raises SpecBranchError for a model or option that cannot be used."""
        if threads is not None and threads < 1:
            raise SpecBranchError(f"threads is {threads}; expected at least 1")
        self._made_of = target, draft, threads, target_threads, cuda_graphs, priority, prompt_cache
        self.prompt_cache = prompt_cache
        self.threads = 1 if forked() else torch.get_num_threads() if threads is None else threads
        for model, role in ((target, "target"), (draft, "draft")):
            if model is not None:
                check_weights(model, role)
        self.first = Slot(
            make_runner(CachedModel(target, "target"), cuda_graphs, priority),
            None if draft is None else make_runner(CachedModel(draft, "draft"), cuda_graphs, priority),
        )
        self.workers = make_workers(
            self.first.target, self.first.draft, self.threads, None if forked() else target_threads
        )
        self._slots = [self.first]
        self._takes = 0
        self._lock = Lock()  # a stream may be collected, and give its slot back, anywhere
        _pairs.add(self)

    def __reduce__(self) -> tuple[type[Pair], tuple[Any, ...]]:
        """A copy, or what is pickled, has the models and makes the rest anew."""
        return Pair, self._made_of

    @property
    def models(self) -> list[PreTrainedModel]:
        target, draft = self.first.target.model.model, self.first.draft
        return [target] if draft is None else [target, draft.model.model]

    @property
    def target(self) -> Runner:
        return self.first.target

    @property
    def draft(self) -> Runner | None:
        return self.first.draft

    @property
    def vocabulary(self) -> int:
        """The target's."""
        return self.first.vocabulary

    @property
    def relative_size(self) -> float:
        """Parameters of the draft's forward over those of the target's; 1 without a draft."""
        sizes = [parameters_of_forward(model) for model in self.models]
        return sizes[-1] / sizes[0]

    def row_dependence(self) -> str:
        """What of the target depends on the rows beside it; see rows.probe.row_dependence."""
        runner = self.target
        fixed_rows = runner.most_rows if isinstance(runner, CapturedRunner) else None
        return row_dependence(runner.model, fixed_rows, runner.device)

    def attachment(self, tap: FeatureTap | None = None, draft: bool = True) -> Attachment:
        """The models as they are to run, with this pair's threads. draft: both of them."""
        return Attachment(self.models[: 1 + draft], tap, self.threads)

    def take(self, owner: object, text: Sequence[int] = ()) -> Slot:
        """A slot for `owner` alone, until it is given back. text: how its text begins; the slot keeps of that what any
        free one keeps."""
        self.workers.wait()  # a second Ctrl-C ends the wait for a verification that goes on

        def taken() -> Slot:
            free = [slot for slot in self._slots if slot.free]
            for slot in free:
                slot.forget_stale()
            known = {slot: slot.target.model.known(text) for slot in free}
            source = max(free, key=known.__getitem__, default=None)
            if source is None or known[source] < LEAST:
                slot = self._spare(free)
            elif (kept := source.target.model.kept) and kept.is_continued(known[source]):
                slot = source
            else:
                slot = self._spare(free)
                if slot is not source:
                    slot.adopt(source, text)
            self._takes += 1
            slot.used, slot._owner = self._takes, ref(owner)
            return slot

        return locked([self._lock], taken)

    def forget(self) -> None:
        """Keep nothing of earlier texts, and no caches but one's."""

        def forgotten() -> None:
            for slot in [slot for slot in self._slots if slot.free]:
                slot.forget()
                if slot is not self.first:
                    self._slots.remove(slot)

        locked([self._lock], forgotten)

    def _spare(self, free: Sequence[Slot]) -> Slot:
        """A slot that keeps nothing, a new one, or the one whose text was used longest ago."""
        empty = next((slot for slot in free if not slot.keeps), None)
        if empty is not None:
            return empty
        if len(free) < max(1, self.prompt_cache):
            self._slots.append(self.first.another())
            return self._slots[-1]
        return min(free, key=lambda slot: slot.used)

    def give_back(self, slot: Slot) -> None:
        """The slot is free again; its buffers are kept while there are few."""

        def given() -> None:
            slot._owner = None
            free = [slot for slot in self._slots if slot.free and slot is not self.first]
            free.sort(key=lambda slot: (slot.keeps > 0, slot.used))
            for spare in free[: len(free) + self.first.free - max(KEPT, self.prompt_cache)]:
                self._slots.remove(spare)

        locked([self._lock], given)

    @contextmanager
    def running(self, features: bool = False) -> Iterator[Slot]:
        """A slot whose models may run in this context. features: its tap reads the target's."""
        slot = self.take(owner=self)
        try:
            slot.target.model.tap = slot.tap if features else None
            with self.attachment(slot.target.model.tap).attached():
                try:
                    yield slot
                finally:
                    self.workers.wait()
        finally:
            slot.target.model.tap = None
            self.give_back(slot)

    def after_fork(self) -> None:
        """In a forked child: work goes on on one thread (see `forked`), and the other threads are not there."""
        self.threads, self._lock = 1, Lock()
        self.workers.after_fork()


_pairs: WeakSet[Pair] = WeakSet()


def _after_fork() -> None:
    for pair in list(_pairs):
        pair.after_fork()


os.register_at_fork(after_in_child=_after_fork)
