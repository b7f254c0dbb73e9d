"""Workers of a replay: no threads, and a clock that is added up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from specbranch.core.messages import Trunk, Verdict
from specbranch.stages import Verifier


@dataclass
class VirtualTime:
    """Workers without threads: both sides' time is added up, and overlapping is arithmetic."""

    now: float = 0.0
    overlapped: bool = False

    def clock(self) -> float:
        return self.now

    def submit(self, target: Verifier, trunk: Trunk) -> VirtualPending:
        begin, self.overlapped = self.now, True
        verdict = target.verify(trunk).result()
        end, self.now = self.now, begin
        return VirtualPending(self, verdict, end)

    @contextmanager
    def draft_threads(self) -> Iterator[None]:
        yield

    def wait(self) -> None:
        pass


@dataclass
class VirtualPending:
    time: VirtualTime
    verdict: Verdict
    end: float

    def done(self) -> bool:
        return self.time.now >= self.end

    def result(self) -> Verdict:
        self.time.now = max(self.time.now, self.end)
        self.time.overlapped = False
        return self.verdict
