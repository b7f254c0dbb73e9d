"""Workers of a replay: no threads, and a clock that is added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from specbranch.core.messages import Verdict
from specbranch.stages import Pending, PendingVerdicts


@dataclass
class VirtualTime:
    """Workers without threads: both sides' time is added up, and overlapping is arithmetic."""

    now: float = 0.0
    overlapped: bool = False

    def clock(self) -> float:
        return self.now

    def submit(self, verify: Callable[[], Sequence[Pending]]) -> VirtualVerdicts:
        begin, self.overlapped = self.now, True
        verdicts = PendingVerdicts(verify()).results()
        end, self.now = self.now, begin
        return VirtualVerdicts(self, verdicts, end)

    @contextmanager
    def draft_threads(self) -> Iterator[None]:
        yield

    def wait(self) -> None:
        pass


@dataclass
class VirtualVerdicts:
    time: VirtualTime
    verdicts: list[Verdict | Exception]
    end: float

    def done(self) -> bool:
        return self.time.now >= self.end

    def results(self) -> list[Verdict | Exception]:
        self.time.now = max(self.time.now, self.end)
        self.time.overlapped = False
        return self.verdicts
