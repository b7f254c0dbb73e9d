"""Policies: how far to draft, what to verify, where to branch. One decoding loop runs them all.

A policy looks at the tree and the situation and returns values; it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specbranch.costs import ModeCosts
from specbranch.errors import SpecBranchError
from specbranch.tree import Tree


@dataclass(frozen=True)
class Situation:
    """What a policy may look at besides the tree.

    overlapped: the draft keeps growing the tree while the target verifies. costs: measured in this mode.
    acceptance: recent chance that the target agrees with a drafted token. remaining: tokens that may still be
    committed. features: the target's hidden features at the last verified token, for a learned predictor (H-RAD);
    None while nothing collects them. Policies read target features here and nowhere else.
    """

    overlapped: bool
    costs: ModeCosts
    acceptance: float
    remaining: int
    features: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """What is verified now: `trunk`, tree nodes with the root first; branches grow at `branch_point`."""

    tree: Tree
    trunk: tuple[int, ...]
    branch_point: int


class Policy(Protocol):
    name: str
    candidates: int  # wanted from the draft at every node; 0: no draft
    overlaps: bool  # has something to draft while the target verifies

    def before(self, tree: Tree, situation: Situation) -> list[int]:
        """Nodes to run the draft over before the trunk is cut; none when it is time to verify."""

    def cut(self, tree: Tree, situation: Situation) -> Cut:
        """Choose the trunk and the branch point."""

    def during(self, cut: Cut, tree: Tree) -> list[int]:
        """Nodes to run the draft over while the target verifies; none when nothing is left to do."""

    def width(self, tree: Tree, node: int, branch_point: int | None) -> int:
        """How many of the candidates just proposed at `node` become its children."""


def open_end(path: tuple[int, ...], tree: Tree, depth: int) -> list[int]:
    """The end of a path as a list, if it may still grow to `depth`; else nothing."""
    end = path[-1]
    return [end] if tree.nodes[end].depth < depth and not tree.children(end) else []


class ChainPolicy:
    """What the policies without branches share: the whole best path is the trunk, one candidate a node."""

    name = "chain"
    candidates = 1
    overlaps = False

    def before(self, tree: Tree, situation: Situation) -> list[int]:
        return []

    def cut(self, tree: Tree, situation: Situation) -> Cut:
        trunk = tree.best_path()[: situation.remaining]
        return Cut(tree, trunk, trunk[-1])

    def during(self, cut: Cut, tree: Tree) -> list[int]:
        return []

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

    def before(self, tree: Tree, situation: Situation) -> list[int]:
        return open_end(tree.best_path(), tree, min(self.length, situation.remaining - 1))


@dataclass(frozen=True)
class Pearl(ChainPolicy):
    """PEARL (arXiv 2408.11850): one branch grows below the trunk while the target verifies it.

    Without overlap there is no such time, and it drafts `length` tokens first, as speculative sampling does.
    """

    length: int = 5
    limit: int = 32
    name = "pearl"
    overlaps = True

    def before(self, tree: Tree, situation: Situation) -> list[int]:
        if situation.overlapped:
            return []
        return open_end(tree.best_path(), tree, min(self.length, situation.remaining - 1))

    def during(self, cut: Cut, tree: Tree) -> list[int]:
        return open_end(tree.best_path(cut.trunk[-1]), tree, self.limit)


@dataclass(frozen=True)
class SpecBranch:
    """SpecBranch (arXiv 2506.01979): branches where the draft is unsure, drafted tails kept.

    epsilon: below this confidence a position is a branch point. k_max: most branches there; their number is
    max(1, floor(k_max * (1 - confidence))). max_trunk: most tokens drafted before the target is asked.
    verify_tail: also verify the drafted tail behind the branch point, as long as a row costs less than it is
    worth; False ends the trunk at the branch point, as the paper does.
    limit: deepest node that is drafted while the target verifies.
    """

    epsilon: float = 0.7
    k_max: int = 6
    max_trunk: int = 12
    verify_tail: bool = True
    limit: int = 32
    name = "specbranch"
    overlaps = True

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise SpecBranchError(f"epsilon is {self.epsilon}; expected 0 <= epsilon <= 1")
        if self.k_max < 1 or self.max_trunk < 1 or self.limit < 1:
            raise SpecBranchError("k_max, max_trunk and limit must be at least 1")

    @property
    def candidates(self) -> int:
        return self.k_max

    def before(self, tree: Tree, situation: Situation) -> list[int]:
        """Draft on while the next token is worth more, by its chance to stand, than the step costs."""
        path = tree.best_path()
        if situation.overlapped and len(path) > 1:
            return []  # after a hit there is a trunk: let the target start at once
        chance = tree.nodes[path[-1]].reach * situation.acceptance
        costs = situation.costs
        step = costs.draft.of(1) + costs.target.per_row
        if len(path) > 1 and chance * costs.seconds_per_token < step:
            return []
        return open_end(path, tree, min(self.max_trunk, situation.remaining - 1))

    def cut(self, tree: Tree, situation: Situation) -> Cut:
        path = tree.best_path()[: situation.remaining]
        unsure = next((node for node in path[1:] if self._confidence(tree, node) < self.epsilon), None)
        point = path[-1] if unsure is None else tree.nodes[unsure].parent
        if tree.nodes[point].proposals is not None:
            tree = tree.branch(point, self._branches(tree, point))
        if not self.verify_tail:
            return Cut(tree, path[: path.index(point) + 1], point)
        if situation.overlapped:
            return Cut(tree, path, point)
        # Serial: nothing grows meanwhile, so the branches are verified beside the trunk where a row pays.
        price = situation.costs.target.per_row / max(situation.costs.seconds_per_token, 1e-9)
        branches = [i for i in tree.children(point) if i not in path and tree.nodes[i].reach > price]
        fits = tree.nodes[point].depth + 1 < situation.remaining
        return Cut(tree, (*path, *branches) if fits else path, point)

    def during(self, cut: Cut, tree: Tree) -> list[int]:
        """The ends of all branches: below the trunk's end and beside it, the likeliest first."""
        beside = [node for node in tree.children(cut.branch_point) if node not in cut.trunk]
        starts = dict.fromkeys([cut.trunk[-1], *beside])
        ends = [end for start in starts for end in self._ends(tree, start)]
        return sorted(ends, key=lambda node: -tree.nodes[node].reach)[: self.k_max]

    def width(self, tree: Tree, node: int, branch_point: int | None) -> int:
        return self._branches(tree, node) if node == branch_point else 1

    def _ends(self, tree: Tree, start: int) -> list[int]:
        return [
            node
            for node in tree.below(start)
            if tree.nodes[node].proposals is None and tree.nodes[node].depth < self.limit
        ]

    def _branches(self, tree: Tree, node: int) -> int:
        proposals = tree.nodes[node].proposals
        assert proposals is not None
        return max(1, int(self.k_max * (1 - proposals.confidence[0])))

    @staticmethod
    def _confidence(tree: Tree, node: int) -> float:
        parent = tree.nodes[tree.nodes[node].parent]
        return tree.nodes[node].reach / parent.reach if parent.reach > 0 else 0.0


POLICIES: dict[str, type] = {policy.name: policy for policy in (Autoregressive, Speculative, Pearl, SpecBranch)}
METHODS = tuple(POLICIES)


def make_policy(method: str, options: dict[str, object]) -> Policy:
    """The policy of a method, with those of `options` that it takes.

    Raises SpecBranchError for an unknown method or an option that no method takes.
    """
    if method not in POLICIES:
        raise SpecBranchError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    known = {name for policy in POLICIES.values() for name in getattr(policy, "__dataclass_fields__", ())}
    if unknown := sorted(set(options) - known):
        raise SpecBranchError(f"unknown option {unknown[0]!r}; expected one of {', '.join(sorted(known))}")
    fields = getattr(POLICIES[method], "__dataclass_fields__", ())
    policy: Policy = POLICIES[method](**{name: value for name, value in options.items() if name in fields})
    return policy
