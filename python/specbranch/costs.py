"""What a forward costs on this machine, measured while decoding, and what follows from it.

Costs only steer how far to draft and whether to overlap; they never change the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DECAY = 0.97  # weight of the past at every new measurement
OUTLIER = 4.0  # a measurement counts as at most so many times what was expected: a laptop that slept says nothing
TRIAL_ROUNDS = 6  # rounds in each mode before "auto" trusts its measurements
RETRY_AFTER = 40  # rounds before the other mode is tried again; doubled every time that it loses
RETRY_ROUNDS = 3
STALE = 0.3  # weight of what was measured before such a trial


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
        if self.known:
            seconds = min(seconds, OUTLIER * self.of(rows))
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
        if self.tokens:
            seconds = min(seconds, OUTLIER * self.seconds_per_token * max(tokens, 1) + OUTLIER * self.target.of(1))
        self.seconds = self.seconds * DECAY + seconds
        self.tokens = self.tokens * DECAY + tokens

    def burst(self) -> int:
        """Draft steps to ask for at once: half of what fits into a verdict's time, so that the policy looks twice."""
        if not (self.target.known and self.draft.known):
            return 1
        return max(1, round(0.5 * self.target.of(4) / max(self.draft.of(4), 1e-9)))

    def fade(self) -> None:
        """What was measured of rounds so far counts little from now on."""
        self.seconds, self.tokens = STALE * self.seconds, STALE * self.tokens

    @property
    def seconds_per_token(self) -> float:
        """What one more committed token is worth: the time it takes on average."""
        return self.seconds / self.tokens if self.tokens else self.target.of(1)


@dataclass
class Costs:
    """Both modes' measurements for one pair of models and one method, and how often the draft is right."""

    serial: ModeCosts = field(default_factory=ModeCosts)
    overlapped: ModeCosts = field(default_factory=ModeCosts)
    accepted: float = 4.0  # prior: 0.8 of 5 tokens
    verified: float = 5.0
    _preferred: bool | None = None
    _patience: int = RETRY_AFTER
    _waited: int = 0
    _trial: int = 0

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

    def choose_overlap(self) -> bool:
        """The mode of the next round: each is tried first, then the cheaper committed token wins. The loser is tried
        again now and then, in case it was measured at a bad moment."""
        for overlapped in (False, True):
            if self.mode(overlapped).rounds < TRIAL_ROUNDS:
                return overlapped
        if self._trial > 0:
            self._trial -= 1
            return not self._preferred
        preferred = self.overlapped.seconds_per_token < self.serial.seconds_per_token
        if preferred != self._preferred:
            self._preferred, self._patience, self._waited = preferred, RETRY_AFTER, 0
        self._waited += 1
        if self._waited <= self._patience:
            return preferred
        self._patience, self._waited, self._trial = 2 * self._patience, 0, RETRY_ROUNDS - 1
        self.mode(not preferred).fade()
        return not preferred
