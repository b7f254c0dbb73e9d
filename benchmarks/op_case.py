"""What bench_ops measures: one op on one input, beside the straightforward torch version, and how it is timed."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch

Functions = dict[str, Callable[[], object]]
"""What to time, by name: "ours" and the peers. Every call does the whole work."""


@dataclass(frozen=True)
class Case:
    op: str
    what: str
    build: Callable[[], Functions]
    """Makes the functions on inputs of their own; the fastest peer counts."""
    bytes: int
    """What the op must read and write at least."""
    flops: int = 0
    """Multiplications and additions, for the ops that can be bound by them."""


@dataclass
class Timing:
    """Seconds per call."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


def measure(case: Case, budget: float) -> dict[str, Timing]:
    """Time all functions of a case in turn, so that a busy moment hits them alike, for about `budget` seconds."""
    functions = case.build()
    timings = {name: Timing([]) for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(timings["ours"].seconds) < 5:
        for name, function in functions.items():
            function()  # its own data back into the caches
            start = time.perf_counter()
            function()
            timings[name].seconds.append(time.perf_counter() - start)
    return timings


def read_bandwidth(seconds: float = 0.5) -> float:
    """Bytes per second that torch's current threads read from memory, the best of several passes over 256 MB."""
    data = torch.ones(1 << 26)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


# ---- On a CUDA device. Inputs rotate over more copies than the L2 cache holds, as far as memory allows.

ROTATED_BYTES = 256 << 20
MAX_COPIES = 64
GRAPH_CALLS = 64
EAGER_CALLS = 16


@dataclass
class CudaTiming:
    """Seconds per call: `eager` called from Python, `graph` as a node of a captured graph, if it can be captured."""

    eager: Timing
    graph: Timing | None
    failure: str = ""
    """Why there is no graph."""


def measure_cuda(case: Case, budget: float) -> dict[str, CudaTiming]:
    """Time all functions of a case in turn with CUDA events, one by one and in a captured graph of many calls."""
    copies = min(MAX_COPIES, max(2, ROTATED_BYTES // max(case.bytes, 1)))
    built = [case.build() for _ in range(copies)]
    rings = {name: [functions[name] for functions in built] for name in built[0]}
    timings = {}
    graphs = {}
    for name, ring in rings.items():
        for function in ring[:3]:
            function()
        torch.cuda.synchronize()
        timings[name] = CudaTiming(Timing([]), None)
        try:
            graphs[name] = capture(ring)
        except Exception as error:
            torch.cuda.synchronize()
            timings[name].failure = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            timings[name].graph = Timing([])
    turns = {name: cycle(ring) for name, ring in rings.items()}
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(timings["ours"].eager.seconds) < 5:
        for name, timing in timings.items():
            timing.eager.seconds.append(events(partial(call_in_turn, turns[name])) / EAGER_CALLS)
            if timing.graph is not None:
                timing.graph.seconds.append(events(graphs[name].replay) / GRAPH_CALLS)
    return timings


def call_in_turn(functions: Iterator[Callable[[], object]]) -> None:
    for _ in range(EAGER_CALLS):
        next(functions)()


def capture(ring: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of GRAPH_CALLS calls, over all inputs in turn."""
    graph = torch.cuda.CUDAGraph()
    turn = cycle(ring)
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            next(turn)()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def events(work: Callable[[], object]) -> float:
    """Seconds that the device spends between the start and the end of `work`."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def copy_bandwidth() -> float:
    """Bytes per second read and written by a copy of 1 GiB on the device, the best of several."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return max(2 * source.nbytes / events(lambda: target.copy_(source)) for _ in range(20))


def dtypes(device: str) -> Iterator[torch.dtype]:
    """float32 and bfloat16; the 16-bit one first where it is what people use."""
    yield from (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16, torch.float32)
