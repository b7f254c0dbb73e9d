"""When to try a draft again that did not pay."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_RETRY = 8  # idle rounds, at least, before the first trial
RETRY_SHARE = 0.02  # of the time that the first trials may cost


@dataclass
class Backoff:
    """Retry a draft that did not pay after some idle rounds; a trial lasts while it pays, and each
    failed trial doubles the wait."""

    idle: int = 0
    failures: int = 0
    lost: float = 0.0

    def over(self, price: float) -> bool:
        """Whether it is time for a trial. price: of its draft step, in plain tokens, of which an idle round gives
        one."""
        wait = max(FIRST_RETRY, max(price, self.lost) / RETRY_SHARE)
        return self.idle >= wait * 2.0**self.failures

    def record(self, drafted: bool, gain: float, trial: bool) -> None:
        """Count a round. drafted: the draft ran. gain: plain tokens' time that the round saved. trial: it was time for
        one."""
        if not drafted:
            self.idle += 1
        elif not trial:
            self.idle, self.failures, self.lost = 0, 0, 0.0
        elif gain < 0:
            self.idle, self.failures, self.lost = 0, self.failures + 1, -gain
