"""The two models of an engine, each with its runner, and how they run at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property

import torch
from transformers import PreTrainedModel

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.model import CachedModel
from specbranch.runtime.placement import make_runner, make_workers
from specbranch.runtime.runner import Runner


class Pair:
    """A target and, but for autoregressive decoding, a draft."""

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None,
        threads: int | None = None,
        target_threads: int | None = None,
        cuda_graphs: bool = True,
        priority: str = "target",
    ) -> None:
        """See SpecBranch.__init__. Raises SpecBranchError for a model or option that cannot be used."""
        if threads is not None and threads < 1:
            raise SpecBranchError(f"threads is {threads}; expected at least 1")
        self.threads = torch.get_num_threads() if threads is None else threads
        self.target: Runner = make_runner(CachedModel(target, "target"), cuda_graphs, priority)
        self.draft: Runner | None = None
        if draft is not None:
            self.draft = make_runner(CachedModel(draft, "draft"), cuda_graphs, priority)
        self.workers = make_workers(self.target, self.draft, self.threads, target_threads)

    @cached_property
    def tap(self) -> FeatureTap:
        """What a learned predictor reads of the target."""
        return FeatureTap(self.target.model.model)

    @property
    def vocabulary(self) -> int:
        """The target's."""
        size: int = self.target.model.vocabulary
        return size

    def need_draft(self, what: str) -> Runner:
        """The draft. Raises SpecBranchError where there is none."""
        if self.draft is None:
            raise SpecBranchError(f"{what} needs a draft model: pass draft=")
        return self.draft

    def reset(self, tokens: int, draft: bool = True) -> None:
        """Start a text of at most `tokens` tokens. Raises SpecBranchError when it does not fit."""
        self.target.reset(tokens)
        if draft and self.draft is not None:
            self.draft.reset(tokens)

    @contextmanager
    def running(self, tap: FeatureTap | None = None) -> Iterator[None]:
        """The context in which the models may run, with this pair's threads. tap: reads the target's features."""
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.threads)
            stack.enter_context(self.target.model.attached(tap))
            if self.draft is not None:
                stack.enter_context(self.draft.model.attached())
            stack.callback(self.workers.wait)
            yield
