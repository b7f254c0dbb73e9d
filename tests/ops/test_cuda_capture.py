"""Capturing on a CUDA device, on a stand-in with torch's rules: a failed capture leaves nothing behind."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_cuda_graphs import Runtime, fake_cuda_graphs

from specbranch.runtime.cuda import Cuda

CPU = torch.device("cpu")


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with fake_cuda_graphs() as runtime:
        yield runtime


def nothing() -> None:
    pass


def value_error() -> None:
    raise ValueError("of the model's own")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [0, 2])
def test_a_failed_capture_leaves_stream_allocator_and_generator_as_they_were(
    runtime: Runtime, error: type[BaseException], before: int
) -> None:
    device = Cuda(CPU, urgent=True)
    for _ in range(before):
        device.capture(nothing)
    run: Callable[[], None] = {
        RuntimeError: runtime.invalidate,  # the driver ends the capture
        ValueError: value_error,  # the capture is still good
        KeyboardInterrupt: interrupt,
    }[error]
    with pytest.raises(error):
        device.capture(run)
    assert runtime.capturing is None
    assert not runtime.pools
    runtime.draw()  # the generator serves work outside graphs again
    device.capture(nothing)  # and another capture in the same memory is good


def test_torchs_own_context_would_leave_them_behind(runtime: Runtime) -> None:
    """What the stand-in does to whoever does not clean up: the test above can fail."""
    graph: torch.cuda.CUDAGraph = torch.cuda.CUDAGraph()
    pool: Any = object()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    with pytest.raises(RuntimeError, match="not permitted"):
        runtime.invalidate()
    with pytest.raises(RuntimeError, match="previous error"):
        graph.capture_end()
    with pytest.raises(RuntimeError, match="outside graph capture"):
        runtime.draw()
    with pytest.raises(RuntimeError, match="already recording"):
        torch.cuda.CUDAGraph().capture_begin(pool=pool, capture_error_mode="thread_local")


def test_workspaces_are_the_graphs_own(runtime: Runtime) -> None:
    """cuBLAS's are cleared right before, so that they are made anew in the graph's memory, and after it, so that nobody
    else works there."""
    seen: list[int] = []
    Cuda(CPU, urgent=False).capture(lambda: seen.append(runtime.workspaces_cleared))
    assert (seen, runtime.workspaces_cleared) == ([1], 2)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_collector_is_off_meanwhile(runtime: Runtime, enabled: bool) -> None:
    device = Cuda(CPU, urgent=True)
    if not enabled:
        gc.disable()
    try:
        device.capture(nothing)
        with pytest.raises(ValueError, match="own"):
            device.capture(value_error)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert not runtime.collected_during_capture


def test_all_graphs_of_a_device_share_their_memory(runtime: Runtime) -> None:
    device = Cuda(CPU, urgent=True)
    for _ in range(3):
        device.capture(nothing)
    assert len({id(graph.pool) for graph in runtime.finished}) == 1
