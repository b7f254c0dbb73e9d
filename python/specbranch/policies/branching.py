"""Policies with branches: SpecBranch, its paper's settings, and SSD's fixed fan-out. One code, different settings.

What may follow a verdict is a pair (i, t): the first i trunk tokens are accepted and the target's next token is t. Its
probability is the `reach` of the node that t would be, beside the trunk or below its end. While the target verifies,
the draft works on the outcomes that `hedge` allows, the likeliest first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace, nsmallest

from specbranch.core.errors import SpecBranchError
from specbranch.core.tree import Tree
from specbranch.policies.policy import Cut, Growth, Situation, grow_end, nothing

HEDGES = ("any", "point", "fan", "none")
FIRST_STEP = 1.15  # times its token's worth: it also says whether going on is worth it


@dataclass(frozen=True)
class SpecBranch:
    """SpecBranch (arXiv 2506.01979) and past it.

    hedge: where branches grow while the target verifies. "point": at one branch point, the first token whose
    confidence is below epsilon, max(1, floor(k_max * (1 - confidence))) of them (the paper). "fan": `fan` candidates
    beside every trunk token (SSD, arXiv 2603.03251). "any": wherever the outcome is likely enough to pay for its row.
    "none": below the trunk's end only.
    k_max: most branches at a point. batch: most nodes in a draft step. beside: most tokens verified beside the path.
    max_trunk: most tokens drafted before the target is asked. limit: deepest node drafted while it verifies.
    verify_tail: also verify the drafted tail behind the branch point; False ends the trunk there, as the paper does.
    calibrate: correct confidences by what the verdicts say. thrifty: draft only while a token is worth its step.
    min_reach: least chance of being accepted, in the draft's eyes, that makes a token worth drafting while the target
    verifies, or worth verifying; higher values waste less and are slower.
    decide_by_outlook: H-RAD's class, where there is a predictor, decides the branch point before the confidence does.
    """

    hedge: str = "any"
    epsilon: float = 0.7
    k_max: int = 6
    fan: int = 2
    batch: int = 8
    beside: int = 8
    max_trunk: int = 12
    limit: int = 32
    verify_tail: bool = True
    calibrate: bool = True
    thrifty: bool = True
    min_reach: float = 0.0
    decide_by_outlook: bool = False
    name = "specbranch"
    overlaps = True

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("min_reach", self.min_reach)):
            if not 0 <= value <= 1:
                raise SpecBranchError(f"{name} is {value}; expected 0 <= {name} <= 1")
        if self.hedge not in HEDGES:
            raise SpecBranchError(f"hedge is {self.hedge!r}; expected one of {', '.join(HEDGES)}")
        if min(self.k_max, self.max_trunk, self.limit, self.batch, self.fan) < 1:
            raise SpecBranchError("k_max, fan, batch, max_trunk and limit must be at least 1")
        if self.beside < 0:
            raise SpecBranchError(f"beside is {self.beside}; expected at least 0")

    @property
    def candidates(self) -> int:
        return max(self.k_max, self.fan + 1)

    @property
    def calibrated(self) -> bool:
        return self.calibrate

    @property
    def foresees(self) -> bool:
        return self.calibrate or self.decide_by_outlook

    def before(self, tree: Tree, situation: Situation) -> Growth:
        """Draft on while the next token is worth more, by its chance to stand, than the step costs."""
        path = tree.best_path()
        if situation.overlapped and len(path) > 1:
            return nothing(tree)  # after a hit there is a trunk: let the target start at once
        if not (self._worth_a_step(tree, path, situation) if self.thrifty else self._sure(tree, path)):
            return nothing(tree)
        return grow_end(tree, path, min(self.max_trunk, situation.remaining - 1))

    def cut(self, tree: Tree, situation: Situation) -> Cut:
        if self.hedge == "any":
            tree = self._with_last_word(tree)
        best = tree.best_path()
        path = self._worth_verifying(tree, best[: situation.remaining], situation)
        if self.hedge == "any" and best[-1] not in path:
            tree = tree.without(best[-1])  # neither run over nor verified: it stays a candidate
        point = self._branch_point(tree, path, situation)
        if not self.verify_tail:
            return Cut(tree, path[: path.index(point) + 1], point)
        return self._with_others(Cut(tree, path, point), situation)

    def during(self, cut: Cut, tree: Tree, situation: Situation) -> Growth:
        """The likeliest outcomes that the draft has not run over: leaves of the tree, and candidates beside it."""
        depth = min(self.limit, situation.remaining - 1)  # no deeper token can be committed
        outcomes = [
            (-node.reach, i, -1) for i, node in enumerate(tree.nodes) if node.proposals is None and node.depth < depth
        ]
        outcomes += self._hedges(cut, tree, depth)
        nodes: list[int] = []
        adopted: list[tuple[int, int]] = []
        for place, (reach, node, rank) in enumerate(nsmallest(self.batch, outcomes)):
            if -reach < self.min_reach or (place > 0 and not self._worth_a_row(-reach, situation)):
                break
            if rank >= 0:
                adopted.append((node, rank))
                node = len(tree) + len(adopted) - 1
            nodes.append(node)
        tree = tree.adopt_all(adopted) if adopted else tree
        deepest = max((tree.nodes[node].depth for node in nodes), default=0)
        return Growth(tree, nodes, min(situation.burst, max(1, depth - deepest)))

    def _with_others(self, cut: Cut, situation: Situation) -> Cut:
        """The cut with outcomes beside its path in the trunk, the likeliest first, while their rows pay."""
        if self.beside == 0 or self.hedge not in ("any", "point"):
            return cut
        tree, trunk = cut.tree, [*cut.trunk]
        found: list[tuple[float, int, int]] = []  # (-reach, node, -1) or, not in the tree yet, (-reach, parent, rank)
        best = [self._least(situation)] * self.beside  # the greatest chances so far, the least of them first

        def offer(reach: float, node: int, rank: int) -> None:
            if reach > best[0]:
                heappush(found, (-reach, node, rank))
                heapreplace(best, reach)

        def look_below(node: int) -> None:
            if self.hedge == "point" and node != cut.branch_point:
                return
            if tree.nodes[node].reach <= best[0] or tree.nodes[node].depth + 1 >= situation.remaining:
                return
            for child in tree.children(node):
                if child not in trunk:
                    offer(tree.nodes[child].reach, child, -1)
            for rank, reach in self._untried(tree, node, self.limit, best[0]):
                offer(reach, node, rank)

        for node in cut.trunk:
            look_below(node)
        adopted: list[tuple[int, int]] = []
        while found and len(trunk) < len(cut.trunk) + self.beside:
            _, node, rank = heappop(found)
            if rank >= 0:
                adopted.append((node, rank))
                trunk.append(len(tree) + len(adopted) - 1)
            else:
                trunk.append(node)
                look_below(node)
        return Cut(tree.adopt_all(adopted) if adopted else tree, tuple(trunk), cut.branch_point)

    def width(self, tree: Tree, node: int, branch_point: int | None) -> int:
        if branch_point is not None and self.hedge == "any":
            return 0  # while the target verifies, a candidate becomes a node when its turn comes
        if node != branch_point or self.hedge != "point":
            return 1
        return self._branches(tree, node)

    def _with_last_word(self, tree: Tree) -> Tree:
        """The tree with the best path's open end: the target may as well judge what the draft said there."""
        end = tree.best_path()[-1]
        return tree if tree.nodes[end].proposals is None else tree.adopt(end, 0)

    def _hedges(self, cut: Cut, tree: Tree, depth: int) -> list[tuple[float, int, int]]:
        """The likeliest outcomes that are not in the tree yet, as (-reach, node, rank of its candidate)."""
        nodes = {"any": range(len(tree)), "point": (cut.branch_point,), "fan": cut.trunk, "none": ()}[self.hedge]
        found: list[tuple[float, int, int]] = []
        best = [0.0] * self.batch  # the greatest chances so far, the least of them first
        for node in nodes:
            if tree.nodes[node].reach <= best[0]:
                continue  # nothing below it is likelier
            for rank, reach in self._untried(tree, node, depth, best[0]):
                if reach > best[0]:
                    found.append((-reach, node, rank))
                    heapreplace(best, reach)
        return found

    def _untried(self, tree: Tree, node: int, depth: int, least: float) -> Iterator[tuple[int, float]]:
        """Candidates of a node above `depth` that are not in the tree and likelier than `least`, as (rank, reach)."""
        proposals = tree.nodes[node].proposals
        if proposals is None or tree.nodes[node].depth >= depth:
            return
        children = tree.children(node)
        known = {tree.nodes[child].token for child in children} if children else ()
        most = self.k_max
        if self.hedge == "point":
            most = self._branches(tree, node)
        elif self.hedge == "fan":
            most = self.fan + 1
        reach = tree.nodes[node].reach
        for rank, (token, chance) in enumerate(zip(proposals.tokens[:most], proposals.confidence, strict=False)):
            if reach * chance <= least and rank > 0:
                return  # the others are less likely still
            if token not in known:
                yield rank, reach * chance

    def _branch_point(self, tree: Tree, path: tuple[int, ...], situation: Situation) -> int:
        if self.decide_by_outlook and situation.outlook is not None:
            if situation.outlook.likeliest == "none":
                return path[0]
            if situation.outlook.likeliest == "all":
                return path[-1]
        unsure = next((node for node in path[1:] if tree.chance(node) < self.epsilon), None)
        return path[-1] if unsure is None else tree.nodes[unsure].parent

    def _worth_a_step(self, tree: Tree, path: tuple[int, ...], situation: Situation) -> bool:
        costs = situation.costs
        if len(path) == 1 and (costs.rounds < 2 or situation.retry):
            return True  # nothing is known yet, or it is time to look again
        worth = tree.nodes[path[-1]].reach * situation.acceptance * costs.token_value
        if len(path) == 1:
            worth *= FIRST_STEP
        return worth >= costs.draft.of(1) + costs.target.per_row

    def _sure(self, tree: Tree, path: tuple[int, ...]) -> bool:
        return len(path) == 1 or tree.chance(path[-1]) >= self.epsilon

    def _worth_verifying(self, tree: Tree, path: tuple[int, ...], situation: Situation) -> tuple[int, ...]:
        """The path as far as a token is worth its row in the target's forward."""
        least = self._least(situation) if self.thrifty else 0.0
        return tuple(node for node in path if node == path[0] or tree.nodes[node].reach >= least)

    def _least(self, situation: Situation) -> float:
        """The least chance that is worth a row in the target's forward: what the row costs, in committed tokens."""
        return max(self.min_reach, situation.costs.row_price)

    def _worth_a_row(self, reach: float, situation: Situation) -> bool:
        """Whether an outcome pays for one more row: if it comes true, a draft step is saved."""
        if self.hedge != "any":
            return True
        return reach * situation.costs.draft.of(1) > situation.costs.draft.per_row

    def _branches(self, tree: Tree, node: int) -> int:
        proposals = tree.nodes[node].proposals
        assert proposals is not None
        return max(1, int(self.k_max * (1 - proposals.confidence[0])))


@dataclass(frozen=True)
class PaperSpecBranch(SpecBranch):
    """SpecBranch as its paper describes it: one branch point, the trunk ends there, confidences as the draft says."""

    hedge: str = "point"
    verify_tail: bool = False
    calibrate: bool = False
    thrifty: bool = False
    decide_by_outlook: bool = True
    name = "specbranch-paper"


@dataclass(frozen=True)
class Ssd(SpecBranch):
    """SSD (Saguaro, arXiv 2603.03251): a fixed number of candidates beside every trunk token.

    Without overlap nothing grows beside the trunk, and it drafts `length` tokens first.
    """

    hedge: str = "fan"
    length: int = 5
    batch: int = 24
    calibrate: bool = False
    thrifty: bool = False
    name = "ssd"

    def before(self, tree: Tree, situation: Situation) -> Growth:
        path = tree.best_path()
        if situation.overlapped and len(path) > 1:
            return nothing(tree)
        return grow_end(tree, path, min(self.length, situation.remaining - 1), situation.burst)

    def cut(self, tree: Tree, situation: Situation) -> Cut:
        path = tree.best_path()[: situation.remaining]
        return Cut(tree, path, path[-1])
