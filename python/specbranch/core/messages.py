"""A step: one forward and what is done with its logits, by the clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """When a forward began and ended, in seconds of the decoder's clock, and over how many rows."""

    begin: float
    end: float
    rows: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin
