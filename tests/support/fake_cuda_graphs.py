"""torch's CUDA graphs without a GPU, with the rules by which they fail: for tests of `specbranch.runtime.cuda.capture`.

A capture that was invalidated ends its stream's capture with an error, before the allocator stops serving it and before
the generator learns of it (torch 2.11). As long as either goes on, nothing else works.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

ALLOCATOR = "already recording to mempool_id"
GENERATOR = "Offset increment outside graph capture encountered unexpectedly"


class Runtime:
    """What torch and the driver know. invalidate: what a forbidden call does to the capture in progress."""

    def __init__(self) -> None:
        self.capturing: Graph | None = None
        self.invalid = False
        self.pools: set[Any] = set()  # that the allocator serves a capture from
        self.generator_captured = False
        self.workspaces_cleared = 0
        self.finished: list[Graph] = []
        self.collected_during_capture = False

    def invalidate(self) -> None:
        self.invalid = True
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def draw(self) -> None:
        """What every use of the generator checks."""
        if self.generator_captured and self.capturing is None:
            raise RuntimeError(GENERATOR)

    def end_allocate(self, device: int, pool: Any) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def clear_workspaces(self) -> None:
        self.workspaces_cleared += 1


class Graph:
    runtime: Runtime

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        runtime = self.runtime
        assert capture_error_mode == "thread_local"
        self.pool = object() if pool is None else pool
        if runtime.capturing is not None:
            raise RuntimeError("the stream is captured already")
        if self.pool in runtime.pools:
            raise RuntimeError(ALLOCATOR)
        runtime.capturing, runtime.invalid = self, False
        runtime.pools.add(self.pool)
        runtime.generator_captured = True
        runtime.collected_during_capture |= gc.isenabled()

    def capture_end(self) -> None:
        runtime = self.runtime
        if runtime.capturing is not self:
            raise RuntimeError("capture_end() called before capture_begin()")
        runtime.capturing = None
        if runtime.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        runtime.pools.remove(self.pool)
        runtime.generator_captured = False
        runtime.finished.append(self)

    def replay(self) -> None:
        pass


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.priority = priority

    def wait_stream(self, other: "Stream") -> None:
        pass


@contextmanager
def fake_cuda_graphs() -> Iterator[Runtime]:
    runtime = Runtime()
    graphs = type("CUDAGraph", (Graph,), {"runtime": runtime})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("CUDAGraph", graphs),
            ("Stream", Stream),
            ("stream", lambda stream: nullcontext()),
            ("current_stream", lambda device=None: Stream()),
            ("graph_pool_handle", object),
        ):
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", runtime.clear_workspaces, raising=False)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", runtime.end_allocate, raising=False)
        yield runtime
