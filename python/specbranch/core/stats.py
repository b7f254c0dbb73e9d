"""What a generation cost and how good the guesses were: counted the same way for every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specbranch.core.messages import Step
from specbranch.core.tree import Tree

CAUSES = ("rejected", "behind_rejection", "losing_branches", "left_over")  # why a drafted token was wasted


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(slots=True)
class Round:
    """What happened between two commits.

    draft, target: the forwards. verified, accepted: drafted tokens scored, and those accepted. retrieved,
    retrieved_accepted: of both, those that were retrieved. forced, forced_accepted: those that a grammar forced, which
    do not count as retrieved. hit: the next token was in the tree. rolled_back, wasted:
    tokens of the best path, and of the whole tree, that were thrown away. rejected, behind_rejection, losing_branches:
    what the wasted ones were, as in Stats.
    """

    begin: float
    overlapped: bool
    end: float = 0.0
    draft: list[Step] = field(default_factory=list)
    target: list[Step] = field(default_factory=list)
    verified: int = 0
    accepted: int = 0
    hit: bool = False
    rejected: int = 0
    behind_rejection: int = 0
    losing_branches: int = 0
    tokens: int = 0
    retrieved: int = 0
    retrieved_accepted: int = 0
    forced: int = 0
    forced_accepted: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def outside_seconds(self) -> float:
        """Time in which neither model works: what the host makes of it."""
        working, end = 0.0, self.begin
        for step in sorted([*self.target, *self.draft], key=lambda step: step.begin):
            working += max(0.0, step.end - max(step.begin, end))
            end = max(end, step.end)
        return self.seconds - working

    @property
    def rolled_back(self) -> int:
        return self.rejected + self.behind_rejection

    @property
    def wasted(self) -> int:
        return self.rolled_back + self.losing_branches


@dataclass
class Stats:
    """Counts over the rounds of one generation; times in seconds.

    target_runner, draft_runner: how their steps ran, "captured" or "eager", and why. target_weights, draft_weights: the
    format of packed weights, "" for weights as they are. row_dependent: which layers of the target keep texts from
    being equal to autoregressive decoding to the bit, "" for none. drafted: tokens that ever became tree nodes; of
    retrieved ones, those that a model has run over. verified: drafted tokens that the target scored. accepted: those of
    them that became part of the text. retrieved, retrieved_accepted: of both, those that were retrieved. forced,
    forced_accepted: of both, those that a grammar forced (and no longer count as retrieved). rolled_back:
    tokens of a tree's best path (the trunk and its likeliest continuation) thrown away. target_busy and draft_busy:
    time inside the models, prefill apart. draft_context_tokens: of the prompt, that the draft read; 0 where it read
    none and the text was decoded without it. draft_prefill_seconds: what that took, whenever it was; part of
    prefill_seconds. plain_token_seconds: of a token without a draft, as measured; 0 where that is not known.
    reused_tokens: of the prompt, that the target did not have to read: it kept them from an earlier text. A forward
    that texts share counts for each of them as its own, with all of its time.
    """

    method: str = ""
    target_runner: str = ""
    draft_runner: str = ""
    target_weights: str = ""
    draft_weights: str = ""
    row_dependent: str = ""
    overlap: bool = False
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_prefill_seconds: float = 0.0
    draft_context_tokens: int = 0
    plain_token_seconds: float = 0.0
    rounds: int = 0
    overlapped_rounds: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    rejected: int = 0
    behind_rejection: int = 0
    losing_branches: int = 0
    hits: int = 0
    retrieved: int = 0
    retrieved_accepted: int = 0
    forced: int = 0
    forced_accepted: int = 0
    target_busy: float = 0.0
    draft_busy: float = 0.0
    log: list[Round] = field(default_factory=list)
    # Accepted ones, in order: what each was.
    _newest: list[str] = field(default_factory=list, repr=False, compare=False)

    def add_reading(self, prompt_tokens: int, seconds: float) -> None:
        """The draft has read so many tokens of the prompt."""
        self.draft_context_tokens = prompt_tokens
        self.draft_prefill_seconds += seconds
        self.prefill_seconds += seconds

    def begin_round(self, now: float, overlapped: bool) -> None:
        self.log.append(Round(now, overlapped))

    def end_round(self, now: float, tokens: int) -> Round:
        round = self.log[-1]
        round.end, round.tokens = now, tokens
        return round

    def add_draft(self, step: Step) -> None:
        self.draft_forwards += 1
        self.draft_busy += step.seconds
        self.log[-1].draft.append(step)

    def add_target(self, step: Step) -> None:
        self.target_forwards += 1
        self.target_busy += step.seconds
        self.log[-1].target.append(step)

    def count(self, tree: Tree, trunk: Sequence[int], path: Sequence[int], next_node: int | None) -> None:
        """Add one round. tree: as it stands at the verdict. trunk: the verified nodes, the root first. path: the
        accepted ones. next_node: the node of the target's next token, if it was drafted."""
        kept = {*path, *(() if next_node is None else tree.below(next_node))}
        free = {*tree.free_nodes()}  # which cost nothing
        round = self.log[-1]
        round.verified, round.accepted = len(trunk) - 1, len(path) - 1
        verified = [_origin(tree, node) for node in trunk[1:]]
        self._newest = [_origin(tree, node) for node in path[1:]]
        round.retrieved, round.forced = verified.count("retrieved"), verified.count("forced")
        round.retrieved_accepted, round.forced_accepted = map(self._newest.count, ("retrieved", "forced"))
        round.hit = next_node is not None
        # Rolled back: what is thrown away of the best path. The first such token has an accepted parent.
        rolled_back = sum(node not in kept and node not in free for node in tree.best_path())
        round.rejected = min(rolled_back, 1)
        round.behind_rejection = rolled_back - round.rejected
        round.losing_branches = len(tree) - len(kept | free) - rolled_back
        self.rounds += 1
        self.verified += round.verified
        self.accepted += round.accepted
        self.retrieved += round.retrieved
        self.retrieved_accepted += round.retrieved_accepted
        self.forced += round.forced
        self.forced_accepted += round.forced_accepted
        self.hits += round.hit
        self.rejected += round.rejected
        self.behind_rejection += round.behind_rejection
        self.losing_branches += round.losing_branches

    def end(self, new_tokens: int) -> None:
        """The text has so many tokens; what the last round committed behind a stop was drafted in vain."""
        beyond, self.new_tokens = self.new_tokens - new_tokens, new_tokens
        if beyond > 0:
            last = self.log[-1]
            self.hits -= last.hit  # the round's last token
            behind = min(beyond - 1, last.accepted)
            self.accepted -= behind
            lost = self._newest[last.accepted - behind :]
            self.retrieved_accepted -= lost.count("retrieved")
            self.forced_accepted -= lost.count("forced")

    @property
    def rolled_back(self) -> int:
        return self.rejected + self.behind_rejection

    @property
    def wasted(self) -> int:
        return self.drafted - self.accepted - self.hits

    @property
    def left_over(self) -> int:
        return self.wasted - self.rolled_back - self.losing_branches

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds

    @property
    def saved_seconds(self) -> float:
        """An estimate of the time that the draft has saved, its prefill paid; negative where it lost some."""
        if not (self.draft_context_tokens or self.retrieved or self.forced) or not self.plain_token_seconds:
            return 0.0
        return self.new_tokens * self.plain_token_seconds - self.decode_seconds - self.draft_prefill_seconds

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
            "target_runner": self.target_runner,
            "draft_runner": self.draft_runner,
            "target_weights": self.target_weights,
            "draft_weights": self.draft_weights,
            "row_dependent": self.row_dependent,
            "overlap": self.overlap,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "draft_prefill_seconds": self.draft_prefill_seconds,
            "draft_context_tokens": self.draft_context_tokens,
            "saved_seconds": self.saved_seconds,
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
            "retrieved_tokens": self.retrieved,
            "retrieved_accepted_tokens": self.retrieved_accepted,
            "forced_tokens": self.forced,
            "forced_accepted_tokens": self.forced_accepted,
            "acceptance_rate": ratio(self.accepted, self.verified),
            "hit_rate": ratio(self.hits, self.rounds),
            "rollback_rate": ratio(self.rolled_back, self.rolled_back + self.accepted + self.hits),
            "wasted_tokens": self.wasted,
            **{cause: getattr(self, cause) for cause in CAUSES},
            "bubble_seconds": self.bubble_seconds,
            "target_busy_seconds": self.target_busy,
            "draft_busy_seconds": self.draft_busy,
        }


def _origin(tree: Tree, node: int) -> str:
    return "forced" if tree.forced(node) else "retrieved" if tree.retrieved(node) else "drafted"
