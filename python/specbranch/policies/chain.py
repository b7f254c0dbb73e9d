"""Policies without branches: one path is drafted and verified."""

from __future__ import annotations

from dataclasses import dataclass

from specbranch.core.tree import Tree
from specbranch.policies.options import Options, option
from specbranch.policies.policy import NOTHING, Expansion, InFlight, State, TrunkChoice, extend, whole_path


class ChainPolicy:
    """What they share: the whole best path is the trunk, one candidate a node."""

    name = "chain"
    candidates = 1
    overlaps = False
    calibrated = False
    thrifty = False
    uses_forecast = False
    may_retrieve = True

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        return NOTHING

    def choose_trunk(self, tree: Tree, state: State) -> TrunkChoice:
        return whole_path(tree, state)

    def draft_during(self, tree: Tree, flight: InFlight, state: State) -> Expansion:
        return NOTHING

    def width(self, tree: Tree, node: int, flight: InFlight | None) -> int:
        return 1


class Autoregressive(ChainPolicy):
    """No draft: one target forward a token."""

    name = "autoregressive"
    candidates = 0
    may_retrieve = False


@dataclass(frozen=True)
class Speculative(Options, ChainPolicy):
    """Speculative sampling (arXiv 2211.17192, 2302.01318): draft `length` tokens, verify, repeat."""

    length: int = option(5, "tokens drafted a round", least=1)
    name = "speculative"

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        return extend(tree, tree.best_choices(), self.length, state.remaining, state.burst)


@dataclass(frozen=True)
class Adaptive(Options, ChainPolicy):
    """Speculative sampling that stops when the draft is unsure, as transformers' assisted generation does."""

    stop_below: float = option(0.4, "stop drafting behind a token with less confidence than this", least=0, most=1)
    max_length: int = option(20, "most tokens drafted a round", least=1)
    name = "adaptive"

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        path = tree.best_choices()
        if len(path) > 1 and tree.chance_of(path[-1]) < self.stop_below:
            return NOTHING
        return extend(tree, path, self.max_length, state.remaining)


@dataclass(frozen=True)
class Pearl(Options, ChainPolicy):
    """PEARL (arXiv 2408.11850): one branch grows below the trunk while the target verifies it.

    Without overlap there is no such time, and it drafts `length` tokens first, as speculative sampling does.
    """

    length: int = option(5, "tokens drafted a round", least=1)
    max_depth: int = option(32, "deepest token drafted while the target verifies", least=1)
    name = "pearl"
    overlaps = True

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        if state.overlapped:
            return NOTHING
        return extend(tree, tree.best_choices(), self.length, state.remaining, state.burst)

    def draft_during(self, tree: Tree, flight: InFlight, state: State) -> Expansion:
        path = tree.best_choices(flight.nodes[-1])
        return extend(tree, path, self.max_depth, state.remaining, state.burst)
