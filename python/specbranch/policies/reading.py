"""When a draft reads a prompt, and how much of it.

A draft's prefill can cost more than a short answer wins back. So it waits until drafting is expected to save more than
reading costs, by what both were measured to take, and of a long prompt it reads the middle only where that is cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from specbranch.core.excerpt import ALL, Excerpt
from specbranch.policies.costs import RETRY_SHARE, Costs

# What may be read of a prompt, and the share of what drafting saves that is lost so.
LOSSES = {Excerpt(256, 128): 0.1, Excerpt(512, 256): 0.03, ALL: 0.0}
PRIOR_TOKENS = 256.0  # one text of so many tokens, before any was seen
FORGETTING = 0.9  # weight of earlier texts at every new one


@dataclass
class Lengths:
    """How long texts get: an estimate of the texts that end at a token, of those that have come so far.

    A text that was cut off says that it did not end there, and nothing more.
    """

    ends: float = 1.0
    tokens: float = PRIOR_TOKENS

    def record(self, tokens: int, ended: bool) -> None:
        """Count a text. ended: by itself."""
        self.ends = self.ends * FORGETTING + ended
        self.tokens = self.tokens * FORGETTING + tokens

    def expected(self, most: int) -> float:
        """Tokens that a text still gets, if it may get at most so many."""
        chance = min(1.0, max(1e-6, self.ends / max(self.tokens, 1.0)))
        return float((1 - (1 - chance) ** most) / chance)


@dataclass(frozen=True, slots=True)
class Unread:
    """A text that the draft has not read.

    costs: measured so far. tokens: how many there are to be read, by excerpt. remaining: tokens that may still be
    committed.
    """

    costs: Costs
    tokens: Mapping[Excerpt, int]
    remaining: int


class Reading(Protocol):
    @property
    def excerpts(self) -> Sequence[Excerpt]:
        """Among which it chooses."""

    def choose(self, text: Unread) -> Excerpt | None:
        """What the draft is to read now; None for nothing yet."""


@dataclass(frozen=True)
class AtOnce:
    """An excerpt of every prompt, before anything is decoded."""

    excerpt: Excerpt

    @property
    def excerpts(self) -> Sequence[Excerpt]:
        return (self.excerpt,)

    def choose(self, text: Unread) -> Excerpt | None:
        return self.excerpt


@dataclass(frozen=True)
class WhenItPays:
    """As soon as drafting is expected to save more than reading costs, and then what is worth most. A draft that is not
    expected to pay is tried again now and then, so that the loss to be expected is at most a RETRY_SHARE of the time
    without it.
    """

    lengths: Lengths
    excerpts = tuple(LOSSES)

    def choose(self, text: Unread) -> Excerpt | None:
        costs = text.costs
        saving = self.lengths.expected(text.remaining) * costs.saving

        def worth(excerpt: Excerpt) -> float:
            return saving * (1 - LOSSES[excerpt]) - costs.reading(text.tokens[excerpt])

        best = max(reversed(LOSSES), key=worth)
        return best if worth(best) >= -RETRY_SHARE * costs.idle else None
