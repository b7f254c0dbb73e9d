"""Where one model runs: in order, on a stream of its own where there are streams.

Work is enqueued and the host goes on; a `Mark` says when the work before it is done. On the CPU everything is done at
once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from specbranch.steps import Step


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
        """Capture what `run` enqueues. It has run before; all graphs of a device share their memory."""


def step(begin: Mark, end: Mark, rows: int, origin: Mark) -> Step:
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


class CudaMark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.clock = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, CudaMark)
        return float(earlier.event.elapsed_time(self.event)) / 1000


class Cuda:
    """A stream of one CUDA device. urgent: before the other streams of that device, where both have work."""

    def __init__(self, device: torch.device, urgent: bool) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1 if urgent else 0)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # the weights may just have been written
        self._pool: Any = None

    def running(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = torch.cuda.stream(self.stream)
        return context

    def mark(self) -> Mark:
        return CudaMark(self.stream)

    def copy(self, to: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)

    def host_memory(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, pin_memory=True)

    def capture(self, run: Callable[[], None]) -> Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The other model's stream may be at work meanwhile, hence thread_local.
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            run()
        return CudaGraph(graph, self.stream)


class CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        self.graph, self.stream = graph, stream

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()
