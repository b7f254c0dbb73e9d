"""What a forward costs on this machine, measured while decoding, and what follows from it.

Costs only steer how far to draft and whether to overlap; they never change the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

DECAY = 0.97  # weight of the past at every new measurement
TRIAL_ROUNDS = 3  # rounds in each mode before "auto" trusts its measurements


@dataclass
class ForwardCost:
    """Seconds of one forward as intercept + slope * rows, an exponentially weighted least-squares fit."""

    count: int = 0
    weight: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    rows_squared: float = 0.0
    rows_seconds: float = 0.0

    def record(self, rows: int, seconds: float) -> None:
        self.count += 1
        if self.count == 1:
            return  # the first forward pays for page faults and lazy set-up
        self.weight = self.weight * DECAY + 1
        self.rows = self.rows * DECAY + rows
        self.seconds = self.seconds * DECAY + seconds
        self.rows_squared = self.rows_squared * DECAY + rows * rows
        self.rows_seconds = self.rows_seconds * DECAY + rows * seconds

    @property
    def known(self) -> bool:
        return self.weight > 0

    @property
    def per_row(self) -> float:
        """Seconds that one more row adds; never negative."""
        spread = self.weight * self.rows_squared - self.rows * self.rows
        if spread <= 1e-6 * self.weight:
            return 0.0
        return max(0.0, (self.weight * self.rows_seconds - self.rows * self.seconds) / spread)

    def of(self, rows: float) -> float:
        """Expected seconds of a forward over `rows` rows; 0 while nothing is known."""
        if not self.known:
            return 0.0
        return max(0.0, (self.seconds + self.per_row * (rows * self.weight - self.rows)) / self.weight)


@dataclass
class ModeCosts:
    """Measurements of one mode, serial or overlapped."""

    target: ForwardCost = field(default_factory=ForwardCost)
    draft: ForwardCost = field(default_factory=ForwardCost)
    rounds: int = 0
    seconds: float = 0.0
    tokens: float = 0.0

    def record_round(self, seconds: float, tokens: int) -> None:
        self.rounds += 1
        if self.rounds == 1:
            return
        self.seconds = self.seconds * DECAY + seconds
        self.tokens = self.tokens * DECAY + tokens

    @property
    def seconds_per_token(self) -> float:
        """What one more committed token is worth: the time it takes on average."""
        return self.seconds / self.tokens if self.tokens else self.target.of(1)


@dataclass
class Costs:
    """Both modes' measurements for one pair of models, and how often the draft is right."""

    serial: ModeCosts = field(default_factory=ModeCosts)
    overlapped: ModeCosts = field(default_factory=ModeCosts)
    accepted: float = 4.0  # prior: 0.8 of 5 tokens
    verified: float = 5.0

    def mode(self, overlapped: bool) -> ModeCosts:
        return self.overlapped if overlapped else self.serial

    def record_verdict(self, accepted: int, rejected: bool) -> None:
        """accepted tokens stood and then, perhaps, one was rejected (what follows it was not judged)."""
        self.accepted = self.accepted * DECAY + accepted
        self.verified = self.verified * DECAY + accepted + rejected

    @property
    def acceptance(self) -> float:
        """Chance that the target agrees with one drafted token."""
        return min(0.99, self.accepted / self.verified)

    def prefer_overlap(self) -> bool:
        """Which mode the next round should run in: each is tried first, then the cheaper token wins."""
        for overlapped in (False, True):
            if self.mode(overlapped).rounds < TRIAL_ROUNDS:
                return overlapped
        return self._overlapped_estimate() < self._serial_estimate()

    def _expected_tokens(self, drafted: float) -> float:
        """Tokens committed by a round that verifies `drafted` tokens, the target's own token included."""
        rejection = 1 - self.acceptance
        return (1 - math.pow(self.acceptance, drafted + 1)) / rejection

    def _serial_estimate(self) -> float:
        """Seconds per token when drafting the best fixed length, then verifying."""
        cost = self.serial
        step = cost.draft.of(1)
        return min((cost.target.of(n + 1) + n * step) / self._expected_tokens(n) for n in range(17))

    def _overlapped_estimate(self) -> float:
        """Seconds per token when the draft works for as long as the target does; a miss drafts serially first."""
        cost = self.overlapped
        drafted = max(1.0, cost.target.of(4) / max(cost.draft.of(2), 1e-9))
        miss = 1 - math.pow(self.acceptance, drafted + 1)
        seconds = cost.target.of(drafted + 1) + miss * min(drafted, 4.0) * self.serial.draft.of(1)
        return seconds / self._expected_tokens(drafted)
