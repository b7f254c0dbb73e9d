"""What bench_ops measures: one op on one input, beside the straightforward torch version."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    op: str
    what: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    """The straightforward torch versions by name; the faster one counts."""
    bytes: int
    """What the op must read and write at least."""
    flops: int = 0
    """Multiplications and additions, for the ops that can be bound by them."""


@dataclass
class Timing:
    """Seconds per call."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


def measure(case: Case, budget: float) -> dict[str, Timing]:
    """Time all functions of a case in turn, so that a busy moment hits them alike, for about `budget` seconds."""
    functions = {"ours": case.ours, **case.peers}
    timings = {name: Timing() for name in functions}
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
