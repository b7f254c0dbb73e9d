"""Two models at once: on a CPU a thread for the target, on devices a stream each."""

from __future__ import annotations

import atexit
import os
import time
from _thread import get_ident, start_new_thread
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast
from weakref import WeakSet, finalize

from specbranch.core.messages import Verdict
from specbranch.runtime.device import Device
from specbranch.runtime.threads import set_threads
from specbranch.stages import Pending, PendingVerdicts, Verdicts

T = TypeVar("T")


class Task(Generic[T]):
    """Work that a Worker was given."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._outcome: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run(self) -> None:
        try:
            self._outcome.put((self._work(), None))
        except BaseException as error:
            self._outcome.put((None, error))

    def done(self) -> bool:
        return not self._outcome.empty()

    def result(self) -> T:
        """What the work returned or raised, when it is done. To be asked for once."""
        value, error = self._outcome.get()
        if error is None:
            return cast(T, value)
        try:
            raise error
        finally:
            del error  # its traceback has this frame


class Worker:
    """A thread that does what it is given, in order. threads: torch's intra-op threads there.

    An interrupt anywhere in the caller's thread leaves it working, since all they share are queues, which wait and pass
    on within C. (Those of concurrent.futures and threading hold locks in Python: an interrupt may leave one locked, and
    the next to come waits forever.)
    """

    def __init__(self, threads: int) -> None:
        self._tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()
        finalize(self, self._tasks.put, None)
        self._thread = start_new_thread(_work_off, (self._tasks, threads))
        _workers.add(self)

    def submit(self, work: Callable[[], T]) -> Task[T]:
        task = Task(work)
        self._tasks.put(task)
        return task

    def wait(self) -> None:
        """Return when all that was given is done. Within the work itself, where an abandoned generation may be
        collected, there is nothing to wait for."""
        if get_ident() != self._thread:
            self.submit(lambda: None).result()


def _work_off(tasks: SimpleQueue[Task[Any] | None], threads: int) -> None:
    set_threads(threads)
    while (task := tasks.get()) is not None:
        task.run()
        del task  # or its result would stay until the next comes


_workers: WeakSet[Worker] = WeakSet()
os.register_at_fork(after_in_child=_workers.clear)  # their threads are not there


@atexit.register
def _wait_for_workers() -> None:
    """What one does while Python is taken down might end the process in a crash."""
    for worker in list(_workers):
        worker.wait()


class VerifyingTask:
    """Verdicts that a Worker makes."""

    def __init__(self, task: Task[list[Verdict | Exception]]) -> None:
        self.done, self.results = task.done, task.result


class Threads:
    """Runs the target on a thread of its own while the caller's thread drafts, each with its share of torch's threads.

    threads: all intra-op threads. The target gets target_threads of them, the draft the rest (at least one each).
    """

    def __init__(self, threads: int, target_threads: int | None = None) -> None:
        self.threads = threads
        self.target = max(1, threads - max(1, threads // 4)) if target_threads is None else target_threads
        self.draft = max(1, threads - self.target)
        self._worker: Worker | None = None

    def clock(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def submit(self, verify: Callable[[], Sequence[Pending]]) -> Verdicts:
        """Verify on the target's thread."""
        if self._worker is None:
            self._worker = Worker(self.target)
        return VerifyingTask(self._worker.submit(lambda: PendingVerdicts(verify()).results()))

    @contextmanager
    def draft_threads(self) -> Iterator[None]:
        """The caller's thread uses the draft's share of the threads in this block."""
        try:
            set_threads(self.draft)
            yield
        finally:
            set_threads(self.threads)

    def wait(self) -> None:
        """Return when the target's thread is idle, so that its caches may be used again."""
        if self._worker is not None:
            self._worker.wait()

    def after_fork(self) -> None:
        """See Pair.after_fork."""
        self.threads = self.target = self.draft = 1
        self._worker = None


class Streams:
    """Models on devices: a step is enqueued on its model's stream, and the caller's thread goes on by itself."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.devices = devices

    def clock(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def submit(self, verify: Callable[[], Sequence[Pending]]) -> Verdicts:
        return PendingVerdicts(verify())

    @contextmanager
    def draft_threads(self) -> Iterator[None]:
        yield

    def wait(self) -> None:
        """Return when nothing is enqueued any more."""
        for mark in [device.mark() for device in self.devices]:
            mark.wait()

    def after_fork(self) -> None:
        """See Pair.after_fork: a forked child cannot use CUDA at all, and torch says so."""
