"""A CUDA device's stream, and graphs captured on it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from specbranch.runtime.device import Graph, Mark


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


class CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        self.graph, self.stream = graph, stream

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()


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
        with torch.cuda.stream(self.stream), uncollected():
            return CudaGraph(capture(run, self._pool, self.device), self.stream)


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector is off: what it freed here might end a capture (page-locked memory, other graphs)."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def capture(run: Callable[[], object], pool: Any, device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of what `run` enqueues on the current stream, with its memory in `pool`.

    Not `torch.cuda.graph`: when a capture fails, its exit raises before it has put back the stream, and torch's
    allocator and generator go on as if they were captured.
    """
    # What cuBLAS works in must be the graph's own: a later clearing elsewhere would pull it from under the graph.
    torch._C._cuda_clearCublasWorkspaces()
    graph = torch.cuda.CUDAGraph()
    try:
        # The other model's stream may be at work meanwhile, hence thread_local.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        run()
        graph.capture_end()
    except BaseException:
        abandon(graph, pool, device)
        raise
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph


def abandon(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """After a capture that failed: stream, allocator and generator as before it."""
    with suppress(RuntimeError):  # ends the stream's capture; says that it was invalid, if it was
        graph.capture_end()
    with suppress(RuntimeError):  # where that came first, the allocator still serves the capture
        torch._C._cuda_endAllocateToPool(device.index, pool)
    del graph
    # Before torch 2.13 the generator counts itself as captured until a capture ends well.
    with suppress(RuntimeError):
        good = torch.cuda.CUDAGraph()
        good.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        good.capture_end()
