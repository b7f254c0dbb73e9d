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
DOUBT = 1.0  # a guess must promise twice what reading costs, which is spent for certain


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

    def choose(self, texts: Sequence[Unread], drafting: int = 0, together: bool = False) -> Sequence[Excerpt | None]:
        """What the draft is to read of each now; None for nothing yet.

        texts: with the same costs. drafting: how many others it drafts for already. together: they are waited for until
        the last one is over.
        """


@dataclass(frozen=True)
class AtOnce:
    """An excerpt of every prompt, before anything is decoded."""

    excerpt: Excerpt

    @property
    def excerpts(self) -> Sequence[Excerpt]:
        return (self.excerpt,)

    def choose(self, texts: Sequence[Unread], drafting: int = 0, together: bool = False) -> Sequence[Excerpt | None]:
        return [self.excerpt] * len(texts)


@dataclass(frozen=True)
class WhenItPays:
    """As soon as drafting is expected to save more than reading costs, and then what is worth most. A draft that is not
    expected to pay is tried again now and then, so that the loss to be expected is at most a RETRY_SHARE of the time
    without it.

    Texts share the draft's steps, so what one of them saves depends on how many are read. Those that are waited for
    together are read all or none: some that are over early make a round of the others hardly cheaper.
    """

    lengths: Lengths
    excerpts = tuple(LOSSES)

    def choose(self, texts: Sequence[Unread], drafting: int = 0, together: bool = False) -> Sequence[Excerpt | None]:
        choices: list[Excerpt | None] = [None] * len(texts)
        bearable = RETRY_SHARE * texts[0].costs.idle
        places = range(len(texts)) if together else self._paying(texts, drafting)
        offers = self._offers([texts[place] for place in places], drafting)
        if not offers:  # but for one, perhaps
            alone = [self._offers([text], drafting)[0] for text in texts]
            place = max(range(len(texts)), key=lambda place: alone[place][0])
            places, offers = range(place, place + 1), [alone[place]]
        if sum(worth for worth, _ in offers) >= -bearable:
            for place, (_, excerpt) in zip(places, offers, strict=True):
                choices[place] = excerpt
        return choices

    def _paying(self, texts: Sequence[Unread], drafting: int) -> Sequence[int]:
        """The places of the most texts that are each worth reading where just they are read."""
        paying: Sequence[int] = range(len(texts))
        while paying:
            offers = self._offers([texts[place] for place in paying], drafting)
            fewer = [place for place, (worth, _) in zip(paying, offers, strict=True) if worth >= 0]
            if len(fewer) == len(paying):
                break
            paying = fewer
        return paying

    def _offers(self, texts: Sequence[Unread], drafting: int) -> list[tuple[float, Excerpt]]:
        """Of each text, if just these are read, how many seconds the best excerpt saves, and which it is."""
        if not texts:
            return []
        costs = texts[0].costs
        saving, doubt = costs.saving(drafting + len(texts)), 1 + DOUBT * costs.gain.guessed

        def offer(text: Unread) -> tuple[float, Excerpt]:
            saved = self.lengths.expected(text.remaining) * saving
            worths = {
                excerpt: saved * (1 - loss) - doubt * costs.reading(text.tokens[excerpt])
                for excerpt, loss in reversed(LOSSES.items())
            }
            best = max(worths, key=worths.__getitem__)
            return worths[best], best

        return [offer(text) for text in texts]
