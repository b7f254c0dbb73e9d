"""What a policy decides: how far to draft, what to verify, where to branch. One decoding loop runs them all.

A policy looks at the tree and the situation and returns values; it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from specbranch.core.tree import Tree
from specbranch.policies.costs import ModeCosts
from specbranch.runtime.hrad.predictor import Outlook

FIRST_RETRY = 8  # rounds without the draft before it gets another chance; doubled whenever that fails


@dataclass(frozen=True)
class Situation:
    """What a policy may look at besides the tree.

    overlapped: the draft keeps growing the tree while the target verifies. costs: measured in this mode.
    acceptance: recent chance that the target agrees with a drafted token. remaining: tokens that may still be
    committed. retry: the draft has rested long enough to be given another chance. burst: draft steps that are best
    asked for at once, because the draft needs no host between them. outlook: a learned predictor's word on the next
    drafted tokens (H-RAD), where there is one.
    """

    overlapped: bool
    costs: ModeCosts
    acceptance: float
    remaining: int
    retry: bool = False
    burst: int = 1
    outlook: Outlook | None = None


@dataclass
class Rest:
    """Rounds since the draft last ran, because it did not pay. It gets another chance after 8 of them, which lasts for
    as long as its tokens stand, and then after 16, 32 …"""

    rounds: int = 0
    patience: int = FIRST_RETRY

    @property
    def over(self) -> bool:
        return self.rounds >= self.patience

    def record(self, drafted: bool, stood: bool) -> None:
        """A round is over; stood: the target agreed with the draft."""
        if not drafted:
            self.rounds += 1
        elif not self.over:
            self.rounds, self.patience = 0, FIRST_RETRY
        elif not stood:
            self.rounds, self.patience = 0, 2 * self.patience


@dataclass(frozen=True)
class Cut:
    """What is verified now: `trunk`, tree nodes with the root first; the paper's branches grow at `branch_point`."""

    tree: Tree
    trunk: tuple[int, ...]
    branch_point: int

    def within(self, rows: int) -> Cut:
        """The same with at most so many nodes in the trunk; parents come first, so what is left is one too."""
        return self if len(self.trunk) <= rows else replace(self, trunk=self.trunk[:rows])


@dataclass(frozen=True)
class Growth:
    """What to draft next: `nodes` of `tree`, and `steps` steps down from them, each over the first candidates of the
    one before; no nodes when nothing is left to do.

    The tree may hold nodes that the policy has just made from candidates.
    """

    tree: Tree
    nodes: list[int]
    steps: int = 1


class Policy(Protocol):
    name: str
    candidates: int  # wanted from the draft at every node; 0: no draft
    overlaps: bool  # has something to draft while the target verifies
    calibrated: bool  # wants confidences corrected by what the verdicts say
    foresees: bool  # uses a learned predictor's outlook, where there is one

    def before(self, tree: Tree, situation: Situation) -> Growth:
        """What to draft before the trunk is cut; nothing when it is time to verify."""

    def cut(self, tree: Tree, situation: Situation) -> Cut:
        """Choose the trunk and the branch point."""

    def during(self, cut: Cut, tree: Tree, situation: Situation) -> Growth:
        """What to draft next while the target verifies."""

    def width(self, tree: Tree, node: int, branch_point: int | None) -> int:
        """How many of the candidates just proposed at `node` become its children."""


def nothing(tree: Tree) -> Growth:
    return Growth(tree, [])


def grow_end(tree: Tree, path: tuple[int, ...], depth: int, burst: int = 1) -> Growth:
    """Growth at the end of a path to `depth` at most, `burst` steps of it; nothing if it may not grow."""
    end = path[-1]
    missing = depth - tree.nodes[end].depth
    if missing < 1 or tree.children(end):
        return nothing(tree)
    return Growth(tree, [end], min(missing, burst))
