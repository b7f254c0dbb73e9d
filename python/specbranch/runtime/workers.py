"""Two models at once: on a CPU a thread for the target, on devices a stream each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from specbranch.core.messages import Trunk
from specbranch.runtime.device import Device
from specbranch.stages import Pending, Verifier


class Threads:
    """Runs the target on a thread of its own while the caller's thread drafts, each with its share of torch's threads.

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

    def submit(self, target: Verifier, trunk: Trunk) -> Pending:
        """Verify on the target's thread."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(
                1, "specbranch-target", initializer=torch.set_num_threads, initargs=(self.target,)
            )
        return self._executor.submit(lambda: target.verify(trunk).result())

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
        if self._executor is not None:  # an interrupt may come before anybody has the future of what it was given
            self._executor.submit(lambda: None).result()

    def after_fork(self) -> None:
        """See Pair.after_fork."""
        self.threads = self.target = self.draft = 1
        self._executor = None


class Streams:
    """Models on devices: a step is enqueued on its model's stream, and the caller's thread goes on by itself."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.devices = devices

    def clock(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def submit(self, target: Verifier, trunk: Trunk) -> Pending:
        return target.verify(trunk)

    @contextmanager
    def draft_threads(self) -> Iterator[None]:
        yield

    def wait(self) -> None:
        """Return when nothing is enqueued any more."""
        for mark in [device.mark() for device in self.devices]:
            mark.wait()

    def after_fork(self) -> None:
        """See Pair.after_fork: a forked child cannot use CUDA at all, and torch says so."""
