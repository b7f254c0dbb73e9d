"""An engine on the CPU whose models run as on a GPU: captured steps on recording devices, overlapped by streams."""

from recording_device import RecordingDevice

from specbranch import SpecBranch
from specbranch.captured import CapturedRunner
from specbranch.overlap import Streams


def capture(engine: SpecBranch, seed: int = 0) -> tuple[RecordingDevice, RecordingDevice]:
    """Give the engine captured runners; returns the target's and the draft's device, which share one log."""
    log: list[tuple[str, str, bool]] = []
    target = RecordingDevice("target", log, seed, pace=0.05)
    draft = RecordingDevice("draft", log, seed + 1)
    engine._target = CapturedRunner(engine._target.model, target)
    assert engine._draft is not None
    engine._draft = CapturedRunner(engine._draft.model, draft)
    engine._workers = Streams([target, draft])
    return target, draft
