"""What a method's tokens cost beside plain decoding, so far."""

from __future__ import annotations

from dataclasses import dataclass

DECAY = 0.99  # weight of the past at every new round: a few texts count
PRIOR_TOKENS = 32.0  # that the guess counts for
OUTLIER = 4.0  # a round counts as at most 4 times what it would take without a draft
STALE = 0.3  # weight of the past when a draft that did not pay is tried again
LONGEST = 12  # drafted tokens that the guess looks at


@dataclass
class Gain:
    """Over the rounds of texts that the draft had read.

    spent: their time, in plain tokens: of what a token takes without a draft. tokens: committed.
    """

    spent: float = 0.0
    tokens: float = 0.0

    def record(self, spent: float, tokens: int, texts: int = 1) -> None:
        """Count a round of so many texts."""
        self.spent = self.spent * DECAY + min(spent, OUTLIER * (tokens + texts))
        self.tokens = self.tokens * DECAY + tokens

    def fade(self) -> None:
        """Let what is known count little from now on."""
        self.spent, self.tokens = STALE * self.spent, STALE * self.tokens

    @property
    def guessed(self) -> float:
        """Share of what is expected that is a guess."""
        return PRIOR_TOKENS / (PRIOR_TOKENS + self.tokens)

    def token_cost(self, guess: float) -> float:
        """Of a token to come, in plain tokens. guess: where little is known."""
        return (PRIOR_TOKENS * guess + self.spent) / (PRIOR_TOKENS + self.tokens)


def guessed_token_cost(acceptance: float, draft: float, row: float) -> float:
    """Of drafting in turn as many tokens as is best, in plain tokens. draft: a draft's step. row: one more row of the
    target's forward."""
    return min((1 + n * (draft + row)) * (1 - acceptance) / (1 - acceptance ** (n + 1)) for n in range(LONGEST + 1))
