"""Where one model runs: in order, on a stream of its own where there are streams.

Work is enqueued and the host goes on; a `Mark` says when the work before it is done. On the CPU everything is done at
once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from specbranch.core.messages import Step


class Mark(Protocol):
    """A place in a device's work."""

    clock: float  # host seconds when it was enqueued

    def done(self) -> bool: ...

    def wait(self) -> None:
        """Return when the work before it is done: the host's one kind of synchronisation."""

    def seconds_since(self, earlier: Mark) -> float:
        """Device time between two marks, both done."""


class Graph(Protocol):
    """Work that was captured once: the same kernels on the same memory, with one launch."""

    def replay(self) -> None: ...


class Device(Protocol):
    """Runs one model's work in order."""

    def running(self) -> AbstractContextManager[object]:
        """What torch is asked to do in this context is enqueued here."""

    def mark(self) -> Mark: ...

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Enqueue a copy; host memory is page-locked and must stay as it is until a later mark is done."""

    def host_memory(self, *shape: int) -> Tensor:
        """Zeros, int64, that `copy` can read and write without waiting."""


class GraphDevice(Device, Protocol):
    """A device that can capture work."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """Capture what `run` enqueues. It has run before; all graphs of a device share their memory.

        Whatever `run` raises comes out, and so does what keeps its work from being captured; the device then goes on
        as if nothing had been asked."""


def step_between(begin: Mark, end: Mark, rows: int, origin: Mark) -> Step:
    """The step between two marks that are done, on the host's clock at `origin`, the mark that work began with."""
    start = origin.clock + begin.seconds_since(origin)
    return Step(start, start + end.seconds_since(begin), rows)


class HostMark:
    """Nothing is ever outstanding."""

    def __init__(self) -> None:
        self.clock = time.perf_counter()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: Mark) -> float:
        return self.clock - earlier.clock


class Host:
    """The CPU: work is done when it is asked for."""

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> Mark:
        return HostMark()

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def host_memory(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)
