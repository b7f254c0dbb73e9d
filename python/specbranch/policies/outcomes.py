"""Which outcomes of a verdict the draft prepares for while the target verifies.

An outcome is a pair (i, t): the first i trunk tokens are accepted and the target's next token is t. Its probability is
the `reach` of the node that t is or would be, beside the trunk or below its end. Each class is one rule for where the
draft may look; the likeliest come first everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Protocol

from specbranch.core.tree import Choice, Tree
from specbranch.policies.policy import InFlight

Outcome = tuple[float, Choice]
"""A place to draft at, and its probability."""


class Outcomes(Protocol):
    anywhere: bool  # whether an outcome must pay for its row

    def likeliest(self, tree: Tree, flight: InFlight, count: int, depth: int) -> list[Outcome]:
        """At most `count` places above `depth` to draft at, likeliest first."""

    def ranks(self, tree: Tree, node: int, branch_point: int) -> int:
        """How many of a trunk node's candidates may be verified beside the path."""

    def width(self, tree: Tree, node: int, flight: InFlight | None) -> int:
        """See Policy.width."""


@dataclass(frozen=True)
class Anywhere:
    """Wherever an outcome is likely. k_max: most candidates of a node."""

    k_max: int
    anywhere = True

    def likeliest(self, tree: Tree, flight: InFlight, count: int, depth: int) -> list[Outcome]:
        return tree.likeliest(count, depth, self.k_max)

    def ranks(self, tree: Tree, node: int, branch_point: int) -> int:
        return self.k_max

    def width(self, tree: Tree, node: int, flight: InFlight | None) -> int:
        return 0  # a candidate becomes a node when its turn comes


@dataclass(frozen=True)
class AtBranchPoint:
    """At one branch point, max(1, floor(k_max * (1 - confidence))) candidates (SpecBranch, arXiv 2506.01979)."""

    k_max: int
    anywhere = False

    def likeliest(self, tree: Tree, flight: InFlight, count: int, depth: int) -> list[Outcome]:
        point = flight.branch_point
        return _likeliest(tree, [point], self.ranks(tree, point, point), count, depth)

    def ranks(self, tree: Tree, node: int, branch_point: int) -> int:
        proposals = tree.proposals[node]
        if node != branch_point or proposals is None:
            return 0
        return max(1, int(self.k_max * (1 - proposals.confidence[0])))

    def width(self, tree: Tree, node: int, flight: InFlight | None) -> int:
        return 1 if flight is None else max(1, self.ranks(tree, node, flight.branch_point))


@dataclass(frozen=True)
class BesideTrunk:
    """`fan` candidates beside every trunk token (SSD, arXiv 2603.03251)."""

    fan: int
    anywhere = False

    def likeliest(self, tree: Tree, flight: InFlight, count: int, depth: int) -> list[Outcome]:
        return _likeliest(tree, flight.nodes, self.fan + 1, count, depth)

    def ranks(self, tree: Tree, node: int, branch_point: int) -> int:
        return 0

    def width(self, tree: Tree, node: int, flight: InFlight | None) -> int:
        return 1


@dataclass(frozen=True)
class BelowTrunk:
    """Below the trunk's end only."""

    anywhere = False

    def likeliest(self, tree: Tree, flight: InFlight, count: int, depth: int) -> list[Outcome]:
        return _likeliest(tree, [], 0, count, depth)

    def ranks(self, tree: Tree, node: int, branch_point: int) -> int:
        return 0

    def width(self, tree: Tree, node: int, flight: InFlight | None) -> int:
        return 1


def _likeliest(tree: Tree, nodes: Sequence[int], ranks: int, count: int, depth: int) -> list[Outcome]:
    """The likeliest of the nodes that wait for the draft, and of the first candidates of some nodes."""
    found = tree.undrafted(depth)
    for node in nodes:
        if tree.depth[node] < depth:
            found += [outcome for outcome in tree.untried(node, ranks) if outcome[0] > 0]
    return nsmallest(count, found, key=lambda outcome: (-outcome[0], outcome[1]))
