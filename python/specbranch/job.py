"""One request on its way through the models: its slot, its text so far, and how it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass

from specbranch.core.generation import Generation
from specbranch.decoding import Decoding
from specbranch.policies.calibration import Calibrator
from specbranch.request import Request
from specbranch.runtime.packed import weight_format
from specbranch.runtime.pair import Slot
from specbranch.runtime.rules import Said, Walk
from specbranch.text.detokenizer import TextBuilder


@dataclass(eq=False)
class Job:
    """builder: of the text, and the slot's owner. walk: None where no rule wants to be asked. calibrator: what this
    text teaches it. begin: when it was asked for, in seconds of time.perf_counter. row_dependent: see Stats. reason:
    why the text is over, once it is; see Generation.finish_reason."""

    request: Request
    said: Said
    builder: TextBuilder
    slot: Slot
    text: Decoding
    walk: Walk | None
    calibrator: Calibrator
    begin: float
    row_dependent: str
    reason: str = ""

    @property
    def drafted(self) -> bool:
        return self.text.drafter is not None

    def take(self, committed: list[int]) -> bool:
        """Add what a round committed; True when the text is over."""
        ended = any(self.builder.add(token) for token in committed) if self.walk is None else self.walk.over
        if ended or self.text.remaining == 0:
            self.reason = "stop" if ended else "length"
        return bool(self.reason)

    def result(self, reason: str = "") -> Generation:
        """reason: where the text is not over by itself."""
        stats, slot, builder = self.text.stats, self.slot, self.builder
        stats.seconds = time.perf_counter() - self.begin
        stats.target_runner = slot.target.note
        stats.target_weights = weight_format(slot.target.model.model)
        if slot.draft is not None and self.drafted:
            stats.draft_runner = slot.draft.note
            stats.draft_weights = weight_format(slot.draft.model.model)
        stats.row_dependent = self.row_dependent
        stats.end(len(builder.tokens))
        logprobs = list(self.said.logprobs) if self.request.rules.logprobs is not None else None
        return Generation(builder.text, builder.tokens, stats, reason or self.reason or "length", logprobs)
