"""A device for captured steps without a GPU: an asynchronous stream and graphs, on the CPU, with CUDA's rules.

What is enqueued runs later: when a mark behind it is waited for, or a little at every question whether one is done. So
a result that is read too early is stale, and host memory that is refilled too early goes wrong, as on a GPU. Time is
virtual, so that what depends on measured times (costs, policies) takes the same course on every machine.

A graph is the list of operations that a function made, with the very tensors it made them on. Replaying it runs no
Python of that function: what was a number then stays that number, and what is not in static memory does not arrive.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specbranch.runtime.device import Mark

aten = torch.ops.aten
FORBIDDEN = {
    aten._local_scalar_dense.default: "reads a value on the host",
    aten.item.default: "reads a value on the host",  # in inference mode it is not taken apart
    aten.is_nonzero.default: "reads a value on the host",
    aten.equal.default: "reads a value on the host",
    aten.nonzero.default: "has an output whose size is data",
    aten.masked_select.default: "has an output whose size is data",
    aten.lift_fresh.default: "copies from pageable host memory (torch.tensor)",
}
QUESTION = 1e-4  # virtual seconds that the host takes to ask whether work is done
ASKING = 2e-6  # the same where work has its time
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Clock:
    """Virtual seconds. They pass while the host asks or waits, and a little at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class NotCapturable(RuntimeError):
    pass


class Recorder(TorchDispatchMode):
    """Notes every operation with its arguments and results; refuses those that a CUDA graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reason = FORBIDDEN.get(func)
        if func in INDEXING and any(getattr(leaf, "dtype", None) == torch.bool for leaf in tree_leaves(args[1])):
            reason = "has an output whose size is data"
        if reason:
            raise NotCapturable(f"{func} {reason}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class RecordedGraph:
    def __init__(self, recorder: Recorder, device: "RecordingDevice") -> None:
        self.calls, self.device = recorder.calls, device
        self.replays = 0
        for _, args, kwargs, results in self.calls:  # capturing computes nothing: nobody may use what it left
            for result in self._fresh(args, kwargs, results):
                result.fill_(float("nan") if result.is_floating_point() else 1)

    @staticmethod
    def _fresh(args: Any, kwargs: Any, results: list[Any]) -> list[Tensor]:
        """Results in memory of their own: not views of an argument, nor an argument itself."""
        given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return [result for result in results if isinstance(result, Tensor) and storage(result) not in given]

    def replay(self) -> None:
        self.replays += 1
        self.device.enqueue("replay", self._run)

    def _run(self) -> None:
        for func, args, kwargs, results in self.calls:
            fresh = {id(result) for result in self._fresh(args, kwargs, results)}
            again = tree_leaves(func(*args, **kwargs))
            for before, after in zip(results, again, strict=True):
                if id(before) in fresh:
                    assert before.shape == after.shape, f"{func}: a graph's shapes are fixed"
                    before.copy_(after)


class RecordedMark:
    def __init__(self, device: "RecordingDevice") -> None:
        self.device, self.place, self.clock = device, device.enqueued, device.clock()

    def done(self) -> bool:
        self.device.ask()
        return self.device.finished >= self.place

    def wait(self) -> None:
        self.device.note("wait", blocking=self.device.finished < self.place)
        while self.device.finished < self.place:
            self.device.finish_one()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, RecordedMark)
        assert self.device.finished >= max(self.place, earlier.place), "the time of a mark that is not done"
        return self.device.times[self.place] - self.device.times[earlier.place]


class RecordingDevice:
    """One stream. log: (name, what, blocking) of everything that was asked, shared by the devices of a pair. pace: how
    likely a question finds one more piece of work done. clock: shared by the devices of a pair."""

    def __init__(
        self,
        name: str = "device",
        log: list[tuple[str, str, bool]] | None = None,
        seed: int = 0,
        pace: float = 0.5,
        clock: Clock | None = None,
    ) -> None:
        self.name, self.log = name, [] if log is None else log
        self.random, self.pace = random.Random(seed), pace
        self.seconds = QUESTION / pace  # a piece of work, on average
        self.clock = Clock() if clock is None else clock
        self.times = [self.clock()]  # when each piece of work was done
        self.queue: deque[tuple[str, Callable[[], object]]] = deque()
        self.enqueued = self.finished = 0
        self.graphs: list[RecordedGraph] = []

    def note(self, what: str, blocking: bool = False) -> None:
        self.log.append((self.name, what, blocking))

    def enqueue(self, what: str, run: Callable[[], object]) -> None:
        self.note(what)
        self.queue.append((what, run))
        self.enqueued += 1

    def ask(self) -> None:
        """Somebody asks whether work is done: time passes, and with some luck a piece of it is."""
        self.clock.now += QUESTION
        if self.random.random() < self.pace:
            self.work(1)

    def finish_one(self) -> None:
        """Somebody waits for the next piece of work."""
        self.clock.now += self.seconds
        self.work(1)

    @torch.inference_mode()
    def work(self, count: int) -> None:
        for _ in range(min(count, len(self.queue))):
            self.queue.popleft()[1]()
            self.finished += 1
            self.times.append(self.done_at())

    def done_at(self) -> float:
        """When the piece of work that has just been done was: now."""
        return self.clock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Eager work comes behind what is enqueued, and is done at once."""
        self.note("eager")
        self.work(len(self.queue))
        self.clock.now += self.seconds
        yield

    def mark(self) -> RecordedMark:
        return RecordedMark(self)

    def copy(self, to: Tensor, source: Tensor) -> None:
        assert not torch.is_inference(to) or torch.is_inference_mode_enabled()
        self.enqueue("copy", lambda: to.copy_(source))

    def host_memory(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    def capture(self, run: Callable[[], object]) -> RecordedGraph:
        assert not self.queue, "capturing while the stream has work"
        with Recorder() as recorder:
            run()
        self.graphs.append(RecordedGraph(recorder, self))
        return self.graphs[-1]

    def counts(self) -> Counter[str]:
        return Counter(what for name, what, _ in self.log if name == self.name)


class TimedDevice(RecordingDevice):
    """A stream whose replays take a fixed time each, and whose copies take none: for what depends on when work ends."""

    def __init__(self, name: str, log: list[tuple[str, str, bool]], clock: Clock, replay_seconds: float) -> None:
        super().__init__(name, log, clock=clock)
        self.replay_seconds = replay_seconds
        self.ends: deque[float] = deque()
        self.free = 0.0  # when all that is enqueued will be done

    def enqueue(self, what: str, run: Callable[[], object]) -> None:
        super().enqueue(what, run)
        self.free = max(self.free, self.clock.now) + (self.replay_seconds if what == "replay" else 0.0)
        self.ends.append(self.free)

    def ask(self) -> None:
        self.clock.now += ASKING
        while self.ends and self.ends[0] <= self.clock.now:
            self.work(1)

    def finish_one(self) -> None:
        self.clock.now = max(self.clock.now, self.ends[0])
        self.work(1)

    def done_at(self) -> float:
        return self.ends.popleft()
