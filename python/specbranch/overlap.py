"""Two models at once on a CPU: a thread for the target, each side with its own number of intra-op threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec

import torch

from specbranch.interfaces import Pending
from specbranch.verifier import Verdict

P = ParamSpec("P")


class Overlap:
    """Runs the target on a thread of its own while the caller's thread drafts.

    threads: all intra-op threads. The target gets target_threads of them, the draft the rest (at least one each).
    """

    def __init__(self, threads: int, target_threads: int | None = None) -> None:
        self.threads = threads
        self.target = max(1, threads - max(1, threads // 4)) if target_threads is None else target_threads
        self.draft = max(1, threads - self.target)
        self._executor: ThreadPoolExecutor | None = None

    def clock(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def submit(self, function: Callable[P, Verdict], *args: P.args, **kwargs: P.kwargs) -> Pending:
        """Start `function` on the target's thread."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(
                1, "specbranch-target", initializer=torch.set_num_threads, initargs=(self.target,)
            )
        return self._executor.submit(function, *args, **kwargs)

    @contextmanager
    def draft_threads(self) -> Iterator[None]:
        """The caller's thread uses the draft's share of the threads in this block."""
        torch.set_num_threads(self.draft)
        try:
            yield
        finally:
            torch.set_num_threads(self.threads)

    def wait(self) -> None:
        """Return when the target's thread is idle, so that its caches may be used again."""
        if self._executor is not None:
            self._executor.submit(lambda: None).result()
