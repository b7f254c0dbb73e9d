"""When to try a draft again that did not pay."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_RETRY = 8  # idle rounds before the first trial


@dataclass
class Backoff:
    """Retry a draft that did not pay after 8 idle rounds; a trial lasts while its tokens are accepted, and each failed
    trial doubles the wait."""

    idle: int = 0
    patience: int = FIRST_RETRY

    @property
    def over(self) -> bool:
        """Whether it is time for a trial."""
        return self.idle >= self.patience

    def record(self, drafted: bool, accepted: bool) -> None:
        """Count a round. drafted: the draft ran. accepted: the target agreed with some of it."""
        if not drafted:
            self.idle += 1
        elif not self.over:
            self.idle, self.patience = 0, FIRST_RETRY
        elif not accepted:
            self.idle, self.patience = 0, 2 * self.patience
