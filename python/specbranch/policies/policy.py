"""What a policy decides: how far to draft, what to verify, where to branch. One decoding loop runs them all.

A policy looks at the tree and the state and returns values; it changes nothing, and the loop alone grows the tree. A
new policy is a class in a file here and a line in methods.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from specbranch.core.messages import Forecast
from specbranch.core.tree import Choice, Tree
from specbranch.policies.costs import ModeCosts


@dataclass(frozen=True, slots=True)
class State:
    """What a policy may look at besides the tree.

    overlapped: the draft keeps growing the tree while the target verifies. costs: measured in this mode. acceptance:
    recent chance that the target agrees with a drafted token. remaining: tokens that may still be committed. retry: it
    is time to give a draft that did not pay another chance. burst: draft steps that are best asked for at once, because
    the draft needs no host between them. forecast: a learned predictor's, for the next drafted tokens (H-RAD). losing:
    drafting has cost this text as much as is bearable. sharing: texts that would share the next draft step.
    """

    overlapped: bool
    costs: ModeCosts
    acceptance: float
    remaining: int
    retry: bool = False
    burst: int = 1
    forecast: Forecast | None = None
    losing: bool = False
    sharing: int = 1

    def step_price(self, rows: int = 1) -> float:
        """Committed tokens that a draft step over so many rows must bring to this text, to pay for itself."""
        return self.costs.step_price(self.sharing, rows)


@dataclass(frozen=True, slots=True)
class Expansion:
    """What to draft next: a step at `choices`, then `steps` - 1 more, each at the first candidates of the one
    before."""

    choices: list[Choice]
    steps: int = 1


@dataclass(frozen=True, slots=True)
class TrunkChoice:
    """What to verify: the root first, parents before children. branch_point: the place in it where the paper's branches
    grow."""

    choices: list[Choice]
    branch_point: int


@dataclass(frozen=True, slots=True)
class InFlight:
    """What the target is verifying: the nodes of its trunk, the root first, and the node of its branch point."""

    nodes: tuple[int, ...]
    branch_point: int


class Policy(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def candidates(self) -> int:
        """Wanted from the draft at every node; 0: no draft."""

    @property
    def overlaps(self) -> bool:
        """Whether it has something to draft while the target verifies."""

    @property
    def calibrated(self) -> bool:
        """Whether it wants confidences corrected by the verdicts."""

    @property
    def thrifty(self) -> bool:
        """Whether measured costs decide when the draft is used."""

    @property
    def may_retrieve(self) -> bool:
        """Whether its tree may have tokens that no draft proposed: retrieved ones, and those that a grammar forces."""

    @property
    def uses_forecast(self) -> bool:
        """Whether it takes a learned predictor's forecast, where there is one."""

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        """What to draft before there is a trunk; nothing when it is time to verify."""

    def choose_trunk(self, tree: Tree, state: State) -> TrunkChoice:
        """What the target is to verify."""

    def draft_during(self, tree: Tree, flight: InFlight, state: State) -> Expansion:
        """What to draft next while the target verifies."""

    def width(self, tree: Tree, node: int, flight: InFlight | None) -> int:
        """How many of the candidates just proposed at `node` become its children at once. flight: None before there is
        a trunk."""


def retrieves(policy: Policy, told: bool | None) -> bool:
    """Whether a method gets retrieved tokens. told: None for "auto": where it goes by measured costs."""
    return policy.may_retrieve and (policy.thrifty if told is None else told)


NOTHING = Expansion([])


def forced_in(tree: Tree, path: list[Choice]) -> int:
    """How many tokens of a path a grammar forces: they are not drafted, and no limit counts them."""
    return sum(choice.rank < 0 and tree.forced(choice.node) for choice in path)


def extend(tree: Tree, path: list[Choice], length: int, remaining: int, burst: int = 1) -> Expansion:
    """Draft at the end of a path, of `length` drafted tokens at most, `burst` steps of it; nothing if it may not
    grow. remaining: as in State."""
    missing = min(length + forced_in(tree, path), remaining - 1) - tree.depth_of(path[-1])
    return NOTHING if missing < 1 else Expansion([path[-1]], min(missing, burst))


def whole_path(tree: Tree, state: State) -> TrunkChoice:
    """The best path, as far as its tokens may still be committed."""
    path = tree.best_choices()[: state.remaining]
    return TrunkChoice(path, len(path) - 1)
