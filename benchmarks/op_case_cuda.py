"""How bench_ops times a case on a CUDA device: called from Python and as a node of a captured graph, with inputs that
rotate over more copies than the L2 cache holds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle

import torch
from op_case import Case, Function, Timing, describe_error, in_turn

from specbranch.runtime.cuda import capture, uncollected

ROTATED_BYTES = 256 << 20
MAX_COPIES = 64
GRAPH_CALLS = 64
EAGER_CALLS = 16


class Gpu:
    """What a measurement needs of the device."""

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, work: Function) -> float:
        """Seconds that the device spends between the start and the end of `work`."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        work()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    def check_that_it_does_not_wait(self, function: Function) -> None:
        """Raises, without harm, for most of what would make a capture fail."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capture(self, work: Function) -> Function:
        """What replays `work` on the current stream. A capture that fails leaves nothing behind."""
        device, stream = torch.device("cuda", torch.cuda.current_device()), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), uncollected():
            graph = capture(work, torch.cuda.graph_pool_handle(), device)
        return graph.replay


@dataclass
class Ring:
    """One function on all copies of its inputs."""

    functions: list[Function]
    never_captured: str = ""

    def calls(self, count: int) -> Function:
        """What makes so many calls, over the copies in turn."""
        turn = cycle(self.functions)

        def work() -> None:
            for _ in range(count):
                next(turn)()

        return work


@dataclass
class CudaTiming:
    """Seconds per call: `eager` called from Python, `graph` as a node of a captured graph."""

    eager: Timing = field(default_factory=lambda: Timing([]))
    graph: Timing | None = None
    no_graph_because: str = ""
    error: str = ""
    """Of a peer that could not be run at all."""


def measure_cuda(case: Case, budget: float, gpu: Gpu) -> dict[str, CudaTiming]:
    """All functions of a case, "ours" first, for about `budget` seconds; an error when ours is wrong or cannot run."""
    rings = build_rings(case)
    timings = {name: CudaTiming() for name in rings}
    for name, ring in list(rings.items()):
        try:
            ring.calls(3)()
            gpu.synchronize()
        except Exception as error:
            if name == "ours":
                raise
            timings[name].error = describe_error(error)
            del rings[name]
    # The graphs come last: when one cannot be captured after all, what was timed before still stands.
    eager = in_turn({name: eager_timer(ring, gpu) for name, ring in rings.items()}, budget / 2)
    for name, timing in eager.items():
        timings[name].eager = timing
    graphs = {}
    for name, ring in rings.items():
        timings[name].no_graph_because = ring.never_captured
        if not ring.never_captured:
            try:
                graphs[name] = graph_timer(ring, gpu)
            except Exception as error:
                timings[name].no_graph_because = describe_error(error)
    if graphs:
        for name, timing in in_turn(graphs, budget / 2).items():
            timings[name].graph = timing
    return timings


def build_rings(case: Case) -> dict[str, Ring]:
    """The functions on as many copies of the inputs as it takes; the first copy is checked."""
    first = case.build()
    first.check()
    copies = min(MAX_COPIES, max(2, ROTATED_BYTES // max(case.bytes, 1)))
    built = [first, *(case.build() for _ in range(copies - 1))]
    rings = {"ours": Ring([copy.ours for copy in built])}
    for name, peer in first.peers.items():
        rings[name] = Ring([copy.peers[name].run for copy in built], peer.never_captured)
    return rings


def eager_timer(ring: Ring, gpu: Gpu) -> Callable[[], float]:
    work = ring.calls(EAGER_CALLS)
    return lambda: gpu.seconds(work) / EAGER_CALLS


def graph_timer(ring: Ring, gpu: Gpu) -> Callable[[], float]:
    gpu.check_that_it_does_not_wait(ring.functions[0])
    replay = gpu.capture(ring.calls(GRAPH_CALLS))
    replay()
    gpu.synchronize()
    return lambda: gpu.seconds(replay) / GRAPH_CALLS


def copy_bandwidth() -> float:
    """Bytes per second read and written by a copy of 1 GiB on the device, the best of several."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    gpu = Gpu()
    return max(2 * source.nbytes / gpu.seconds(lambda: target.copy_(source)) for _ in range(20))
