"""Policies without branches: one path is drafted and verified."""

from __future__ import annotations

from dataclasses import dataclass

from specbranch.core.errors import SpecBranchError
from specbranch.core.tree import Tree
from specbranch.policies.policy import Cut, Growth, Situation, grow_end, nothing


class ChainPolicy:
    """What they share: the whole best path is the trunk, one candidate a node."""

    name = "chain"
    candidates = 1
    overlaps = False
    calibrated = False
    foresees = False

    def before(self, tree: Tree, situation: Situation) -> Growth:
        return nothing(tree)

    def cut(self, tree: Tree, situation: Situation) -> Cut:
        trunk = tree.best_path()[: situation.remaining]
        return Cut(tree, trunk, trunk[-1])

    def during(self, cut: Cut, tree: Tree, situation: Situation) -> Growth:
        return nothing(tree)

    def width(self, tree: Tree, node: int, branch_point: int | None) -> int:
        return 1


class Autoregressive(ChainPolicy):
    """No draft: one target forward a token."""

    name = "autoregressive"
    candidates = 0


@dataclass(frozen=True)
class Speculative(ChainPolicy):
    """Speculative sampling (arXiv 2211.17192, 2302.01318): draft `length` tokens, verify, repeat."""

    length: int = 5
    name = "speculative"

    def before(self, tree: Tree, situation: Situation) -> Growth:
        return grow_end(tree, tree.best_path(), min(self.length, situation.remaining - 1), situation.burst)


@dataclass(frozen=True)
class Adaptive(ChainPolicy):
    """Speculative sampling that stops when the draft is unsure, as transformers' assisted generation does.

    stop: drafting ends behind the first token with less confidence than this. max_length: most tokens a round.
    """

    stop: float = 0.4
    max_length: int = 20
    name = "adaptive"

    def __post_init__(self) -> None:
        if not 0 <= self.stop <= 1:
            raise SpecBranchError(f"stop is {self.stop}; expected 0 <= stop <= 1")

    def before(self, tree: Tree, situation: Situation) -> Growth:
        path = tree.best_path()
        if len(path) > 1 and tree.chance(path[-1]) < self.stop:
            return nothing(tree)
        return grow_end(tree, path, min(self.max_length, situation.remaining - 1))


@dataclass(frozen=True)
class Pearl(ChainPolicy):
    """PEARL (arXiv 2408.11850): one branch grows below the trunk while the target verifies it.

    Without overlap there is no such time, and it drafts `length` tokens first, as speculative sampling does.
    """

    length: int = 5
    limit: int = 32
    name = "pearl"
    overlaps = True

    def before(self, tree: Tree, situation: Situation) -> Growth:
        if situation.overlapped:
            return nothing(tree)
        return grow_end(tree, tree.best_path(), min(self.length, situation.remaining - 1), situation.burst)

    def during(self, cut: Cut, tree: Tree, situation: Situation) -> Growth:
        depth = min(self.limit, situation.remaining - 1)
        return grow_end(tree, tree.best_path(cut.trunk[-1]), depth, situation.burst)
