"""What the stages of a round tell each other: plain values, without tensors, so that they could travel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from specbranch.core.tree import ProposalRows, Proposals, Tree

FORECASTS = ("none", "some", "all")


@dataclass(frozen=True, slots=True)
class Step:
    """One forward and what is done with its logits: when, in seconds of the loop's clock, and over how many rows, of
    all texts that share it."""

    begin: float
    end: float
    rows: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Trunk:
    """The tokens that the target verifies, as a tree of integers; all that it learns of the draft's work.

    tokens: the root (the last committed token) first. parents: each token's parent, as its place in `tokens`; -1 for
    the root, and parents come first. position: the root's, in the text; a child stands one further than its parent.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    position: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def positions(self) -> list[int]:
        """Each token's position in the text."""
        positions: list[int] = []
        for parent in self.parents:
            positions.append(self.position if parent < 0 else positions[parent] + 1)
        return positions

    @staticmethod
    def of(tree: Tree, nodes: tuple[int, ...]) -> Trunk:
        """The trunk over some nodes of a tree: the root first, parents before children."""
        place = {node: i for i, node in enumerate(nodes)}
        parents = tuple(place.get(tree.parent[node], -1) for node in nodes)
        return Trunk(tuple(tree.tokens(nodes)), parents, tree.position)


class Forecast(NamedTuple):
    """A learned predictor's probabilities that none, some or all of the next drafted tokens will be accepted."""

    none: float
    some: float
    all: float

    @property
    def likeliest(self) -> str:
        """One of FORECASTS."""
        return FORECASTS[self.index(max(self))]

    def log_odds(self, depth: int) -> float:
        """Log-odds that the draft's first candidate after a node at `depth` is accepted, if that node is."""
        yes, no = (self.some + self.all, self.none) if depth == 0 else (self.all, self.some)
        return math.log(max(yes, 1e-3) / max(no, 1e-3))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's answer to a trunk.

    path: the accepted drafted tokens, as places in the trunk, from the root's child down. next_token: the target's
    token behind them. step: the forward that it took. forecast: for the next drafted tokens, where there is a
    predictor.
    """

    path: tuple[int, ...]
    next_token: int
    step: Step
    forecast: Forecast | None = None


class Drafted(NamedTuple):
    """What a run of the draft gave, over some nodes and then over the first candidates of each step.

    proposals: [steps][nodes]. steps: the forwards.
    """

    proposals: ProposalRows | list[list[Proposals]]
    steps: list[Step]
