"""What a generation cost and how good the guesses were: counted the same way for every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specbranch.tree import Tree
from specbranch.verifier import Verdict


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass
class Stats:
    """Counts over the rounds of one generation; times in seconds.

    drafted: tokens that ever became tree nodes. verified: drafted tokens that the target scored. accepted: those
    that stood. rolled_back: tokens of a tree's best path (the trunk and its likeliest continuation) thrown away.
    target_busy and draft_busy: time inside the models, prefill apart.
    """

    method: str = ""
    overlap: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    rounds: int = 0
    overlapped_rounds: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    rolled_back: int = 0
    hits: int = 0
    target_busy: float = 0.0
    draft_busy: float = 0.0

    def count(self, tree: Tree, trunk: tuple[int, ...], verdict: Verdict, next_node: int | None) -> None:
        """Add one round. tree: as it stood at the verdict; next_node: the node of the next token, if drafted."""
        kept = {*verdict.path, *(() if next_node is None else tree.below(next_node))}
        self.rounds += 1
        self.verified += len(trunk) - 1
        self.accepted += verdict.accepted
        self.hits += next_node is not None
        self.rolled_back += sum(node not in kept for node in tree.best_path())

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds

    @property
    def bubble_seconds(self) -> float:
        """Time that one model waited for the other: what both could have worked less what they did."""
        if not self.draft_forwards:
            return 0.0
        return max(0.0, 2 * self.decode_seconds - self.target_busy - self.draft_busy)

    def as_dict(self) -> dict[str, Any]:
        """Everything that is reported; rates are 0 where nothing was drafted.

        A verdict whose next token was a drafted node makes that node a committed token, so hits are not wasted.
        """
        return {
            "method": self.method,
            "overlap": self.overlap,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "tokens_per_second": ratio(self.new_tokens, self.seconds),
            "decode_tokens_per_second": ratio(self.new_tokens, self.decode_seconds),
            "target_forwards": self.target_forwards,
            "draft_forwards": self.draft_forwards,
            "tokens_per_target_forward": ratio(self.new_tokens, self.target_forwards),
            "rounds": self.rounds,
            "overlapped_rounds": self.overlapped_rounds,
            "drafted_tokens": self.drafted,
            "verified_tokens": self.verified,
            "accepted_tokens": self.accepted,
            "acceptance_rate": ratio(self.accepted, self.verified),
            "hit_rate": ratio(self.hits, self.rounds),
            "rollback_rate": ratio(self.rolled_back, self.rolled_back + self.accepted + self.hits),
            "wasted_tokens": self.drafted - self.accepted - self.hits,
            "bubble_seconds": self.bubble_seconds,
            "target_busy_seconds": self.target_busy,
            "draft_busy_seconds": self.draft_busy,
        }
