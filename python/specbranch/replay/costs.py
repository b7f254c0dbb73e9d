"""What forwards cost in a replay."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from specbranch.replay.record import Record


@dataclass(frozen=True)
class Line:
    """Seconds of a forward by its rows, linear between the points and beyond the last two."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, rows: float) -> float:
        if len(self.points) == 1:
            return self.points[0][1]
        i = min(max(bisect_right(self.points, (rows, float("inf"))), 1), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[i - 1], self.points[i]
        return max(0.0, y0 + (y1 - y0) * (rows - x0) / (x1 - x0))


@dataclass(frozen=True)
class ReplayCosts:
    """Seconds of forwards by mode and model; round: seconds of a round outside the models."""

    serial_target: Line
    serial_draft: Line
    overlapped_target: Line
    overlapped_draft: Line
    round: float = 0.0

    @staticmethod
    def ratio(c: float, target_row: float = 0.0, draft_row: float = 0.0) -> ReplayCosts:
        """A target forward takes 1, a draft forward 1 / c, alone or together; each more row adds its share of that."""
        target = Line(((1, 1.0), (2, 1.0 + target_row)))
        draft = Line(((1, 1 / c), (2, (1 + draft_row) / c)))
        return ReplayCosts(target, draft, target, draft)

    @staticmethod
    def of(record: Record) -> ReplayCosts:
        """As measured when the record was made."""
        lines = {
            (mode, model): Line(tuple((rows, seconds) for rows, seconds in points))
            for mode, models in record.costs.items()
            for model, points in models.items()
        }
        return ReplayCosts(
            lines["serial", "target"],
            lines["serial", "draft"],
            lines["overlapped", "target"],
            lines["overlapped", "draft"],
            record.round_seconds,
        )
