"""What bench_ops measures: one op on one input, beside the straightforward torch version, and how it is timed."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

Function = Callable[[], object]
"""What is timed: every call does the whole work."""


@dataclass(frozen=True)
class Peer:
    """Another way to the same result."""

    run: Function
    never_captured: str = ""
    """Why it must not be captured in a CUDA graph, if so: a capture that fails leaves the process broken."""


@dataclass(frozen=True)
class Built:
    """The functions of a case on inputs of their own."""

    ours: Function
    peers: dict[str, Peer]
    check: Function
    """Raises when ours is wrong. It may take long and change the inputs: for one of several copies."""


@dataclass(frozen=True)
class Case:
    """Cheap to make: there are inputs only when it is built."""

    op: str
    what: str
    build: Callable[[], Built]
    bytes: int
    """What the op must read and write at least."""
    flops: int = 0
    """Multiplications and additions, for the ops that can be bound by them."""
    quick: bool = False
    """One of the few for a first impression."""


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
    """All functions of a case, "ours" first, for about `budget` seconds; an error when ours is wrong."""
    built = case.build()
    built.check()
    functions = {"ours": built.ours} | {name: peer.run for name, peer in built.peers.items()}
    for function in functions.values():
        function()
    return in_turn({name: partial(second_call, function) for name, function in functions.items()}, budget)


def in_turn(timers: dict[str, Callable[[], float]], budget: float) -> dict[str, Timing]:
    """Ask all timers in turn, so that a busy moment hits them alike: for about `budget` seconds, at least 5 times."""
    timings = {name: Timing([]) for name in timers}
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name, seconds in timers.items():
            timings[name].seconds.append(seconds())
        rounds += 1
    return timings


def second_call(function: Function) -> float:
    function()  # its own data back into the caches
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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


def describe_error(error: BaseException) -> str:
    """Its kind and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def dtypes(device: str) -> Iterator[torch.dtype]:
    """float32 and bfloat16; the 16-bit one first where it is what people use."""
    yield from (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16, torch.float32)
