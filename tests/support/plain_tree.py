"""The speculation tree in plain Python: what the compiled one (csrc/tree/tree.h) is defined by, to the last bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from specbranch.core.tree import Choice, ProposalRows, Proposals


class PlainTree:
    """See specbranch.core.tree.Tree."""

    __slots__ = ("_frontier", "_offered", "children", "depth", "parent", "position", "proposals", "reach", "token")

    def __init__(self, token: int, position: int) -> None:
        self.position = position
        self.token, self.parent, self.depth = [token], [-1], [0]
        self.reach = [1.0]
        self.proposals: list[Proposals | None] = [None]
        self.children: list[list[int]] = [[]]
        self._frontier = [(-1.0, 0, -1)]  # (-reach, node, rank)
        self._offered = [1]  # by node: the highest rank in the frontier

    def __len__(self) -> int:
        return len(self.token)

    # ---- Growing

    def add(self, parent: int, token: int, reach: float) -> int:
        """Append a node; returns its index."""
        node = len(self.token)
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.reach.append(reach)
        self.proposals.append(None)
        self.children.append([])
        self.children[parent].append(node)
        self._offered.append(1)
        heappush(self._frontier, (-reach, node, -1))
        return node

    def take(self, choice: Choice) -> int:
        """The node of a choice; a candidate becomes one."""
        if choice.rank < 0:
            return choice.node
        return self.add(choice.node, self._at(choice.node).tokens[choice.rank], self.reach_of(choice))

    def note(self, node: int, proposals: Proposals) -> None:
        """Keep what the draft proposes after `node`; no candidate becomes a node yet."""
        self.proposals[node] = proposals
        for rank in range(min(2, len(proposals.tokens))):
            self._offer(node, rank)

    def descend(self, nodes: Sequence[int], proposals: ProposalRows | Sequence[Sequence[Proposals]]) -> list[int]:
        """Note a draft's run: proposals[0] at `nodes`, proposals[1] at the first candidates there, and so on.

        Those candidates become nodes, in that order. Returns all the nodes where something was noted.
        """
        below, everywhere = list(nodes), list(nodes)
        for step, row in enumerate(proposals):
            if step:
                below = [self.take(Choice(node, 0)) for node in below]
                everywhere += below
            for node, found in zip(below, row, strict=True):
                self.note(node, found)
        return everywhere

    def branch(self, node: int, width: int) -> None:
        """Make nodes of the first `width` candidates of `node`; those that are nodes already stay."""
        for rank in range(min(width, len(self._at(node).tokens))):
            if not self._is_child(node, rank):
                self.take(Choice(node, rank))

    def reroot(self, node: int) -> tuple[PlainTree, dict[int, int]]:
        """The subtree at `node` as a tree of its own, and the map from old to new indices of what survives."""
        kept = {old: new for new, old in enumerate(self.below(node))}
        tree = PlainTree(self.token[node], self.position + self.depth[node])
        top = self.reach[node]
        for old, new in kept.items():
            if new:
                tree.add(kept[self.parent[old]], self.token[old], self.reach[old] / top if top > 0 else 1.0)
        for old, new in kept.items():
            if (proposals := self.proposals[old]) is not None:
                tree.note(new, proposals)
        return tree, kept

    # ---- Asking

    def tokens(self, nodes: Iterable[int]) -> list[int]:
        return [self.token[node] for node in nodes]

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if there is one."""
        return next((child for child in self.children[node] if self.token[child] == token), None)

    def path(self, node: int) -> list[int]:
        """The nodes from the root to `node`, both included."""
        path = [node]
        while (node := self.parent[node]) >= 0:
            path.append(node)
        return path[::-1]

    def best_path(self, start: int = 0) -> list[int]:
        """The path that goes on from `start` to the likeliest child at every node; `start` included."""
        path = [start]
        while children := self.children[path[-1]]:
            path.append(children[0] if len(children) == 1 else max(children, key=self.reach.__getitem__))
        return path

    def best_choices(self, start: int = 0) -> list[Choice]:
        """The best path as choices; at its end the draft's newest first candidate, if that is no node yet."""
        path = [Choice(node) for node in self.best_path(start)]
        if self.proposals[path[-1].node] is not None:
            path.append(Choice(path[-1].node, 0))
        return path

    def below(self, node: int) -> list[int]:
        """`node` and all its descendants, in the order they were added."""
        members = [node]
        for member in members:
            members.extend(self.children[member])
        return sorted(members)

    def depth_of(self, choice: Choice) -> int:
        """The depth of the node that a choice is or would be."""
        return self.depth[choice.node] + (choice.rank >= 0)

    def reach_of(self, choice: Choice) -> float:
        """The estimated probability that the target accepts the path down to a choice."""
        reach = self.reach[choice.node]
        return reach if choice.rank < 0 else reach * self._at(choice.node).confidence[choice.rank]

    def chance_of(self, choice: Choice) -> float:
        """The same, given that it accepts the parent."""
        parent = self.parent[choice.node] if choice.rank < 0 else choice.node
        above = self.reach[parent] if parent >= 0 else 1.0
        return self.reach_of(choice) / above if above > 0 else 0.0

    def deepest(self, choices: Sequence[Choice]) -> int:
        """The depth of the deepest choice; 0 without one."""
        return max((self.depth_of(choice) for choice in choices), default=0)

    def reaches(self, choices: Sequence[Choice]) -> list[float]:
        """`reach_of` each."""
        return [self.reach_of(choice) for choice in choices]

    def chances(self, choices: Sequence[Choice]) -> list[float]:
        """`chance_of` each."""
        return [self.chance_of(choice) for choice in choices]

    def untried(self, node: int, ranks: int) -> list[tuple[float, Choice]]:
        """The first `ranks` candidates of `node` that are no nodes yet, best first, with the reach of each."""
        if (proposals := self.proposals[node]) is None:
            return []
        known = [self.token[child] for child in self.children[node]]
        return [
            (self.reach[node] * proposals.confidence[rank], Choice(node, rank))
            for rank, token in enumerate(proposals.tokens[:ranks])
            if token not in known
        ]

    def offers(self, node: int, ranks: int, least: float) -> list[tuple[float, Choice]]:
        """What is or could be below `node` with a reach above `least`, and that reach: its children, then its first
        `ranks` candidates that are no nodes yet."""
        children = [(self.reach[child], Choice(child)) for child in self.children[node]]
        return [offer for offer in children + self.untried(node, ranks) if offer[0] > least]

    def undrafted(self, depth: int) -> list[tuple[float, Choice]]:
        """The nodes above `depth` that the draft has not run over, with the reach of each."""
        return [
            (self.reach[node], Choice(node))
            for node, proposals in enumerate(self.proposals)
            if proposals is None and self.depth[node] < depth
        ]

    def likeliest(self, count: int, depth: int, ranks: int) -> list[tuple[float, Choice]]:
        """The `count` likeliest places to draft at, in order, with the reach of each: nodes above `depth` that the
        draft has not run over, and those of the first `ranks` candidates after such a node that are no nodes yet."""
        found: list[tuple[float, Choice]] = []
        kept: list[tuple[float, int, int]] = []
        frontier = self._frontier
        while frontier and len(found) < count:
            entry = heappop(frontier)
            cost, node, rank = entry
            if rank < 0:
                stale = self.proposals[node] is not None
            else:
                if rank == self._offered[node]:
                    self._offered[node] += 1
                    self._offer(node, rank + 1)
                stale = self._is_child(node, rank)
            if not stale:
                kept.append(entry)
                if rank < ranks and self.depth[node] < depth:
                    found.append((-cost, Choice(node, rank)))
        for entry in kept:
            heappush(frontier, entry)
        return found

    def _offer(self, node: int, rank: int) -> None:
        """Put a candidate into the frontier, unless there is none or it cannot be reached."""
        proposals = self._at(node)
        if rank < len(proposals.tokens) and (reach := self.reach[node] * proposals.confidence[rank]) > 0:
            heappush(self._frontier, (-reach, node, rank))

    def _is_child(self, node: int, rank: int) -> bool:
        children = self.children[node]
        return bool(children) and self.child(node, self._at(node).tokens[rank]) is not None

    def _at(self, node: int) -> Proposals:
        proposals = self.proposals[node]
        if proposals is None:
            raise ValueError(f"node {node} has no proposals yet: the draft has not run over it")
        return proposals
