"""An engine on the CPU whose models run as on a GPU: captured steps on recording devices, overlapped by streams."""

from collections.abc import Sequence

from recording_device import Clock, RecordingDevice, TimedDevice

from specbranch import SpecBranch
from specbranch.runtime.device import Device
from specbranch.runtime.graphs.runner import CapturedRunner
from specbranch.runtime.workers import Streams


class VirtualStreams(Streams):
    """Streams whose time is the devices'."""

    def __init__(self, devices: Sequence[Device], clock: Clock) -> None:
        super().__init__(devices)
        self._clock = clock

    def clock(self) -> float:
        return self._clock()


def capture(engine: SpecBranch, seed: int = 0) -> tuple[RecordingDevice, RecordingDevice]:
    """Give the engine captured runners; returns the target's and the draft's device, which share one log."""
    log: list[tuple[str, str, bool]] = []
    clock = Clock()
    target = RecordingDevice("target", log, seed, pace=0.05, clock=clock)
    draft = RecordingDevice("draft", log, seed + 1, clock=clock)
    place(engine, target, draft, clock)
    return target, draft


def capture_timed(
    engine: SpecBranch, target_seconds: float, draft_seconds: float
) -> tuple[RecordingDevice, RecordingDevice]:
    """The same on devices whose steps take these virtual seconds."""
    log: list[tuple[str, str, bool]] = []
    clock = Clock()
    target = TimedDevice("target", log, clock, target_seconds)
    draft = TimedDevice("draft", log, clock, draft_seconds)
    place(engine, target, draft, clock)
    return target, draft


def place(engine: SpecBranch, target: RecordingDevice, draft: RecordingDevice, clock: Clock) -> None:
    first = engine.pair.first
    assert first.draft is not None
    first.target, first.draft = CapturedRunner(first.target.model, target), CapturedRunner(first.draft.model, draft)
    engine.pair.workers = VirtualStreams([target, draft], clock)
