"""The speculation tree: drafted tokens below the last committed token.

A tree is a value. Growing or re-rooting it returns another tree; node indices stay valid while it grows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple


class Signals(NamedTuple):
    """What the draft said at one node, before calibration.

    agreement: the estimated chance that the target picks the first candidate (a softmax of perturbed scores; at
    temperature 0 the draft's probability). entropy: of the draft's distribution, in nats. margin: score of the first
    candidate less that of the second. depth: the node's, in the tree where the draft ran over it. outlook: log-odds
    that a learned predictor gave the first candidate; 0 without one.
    """

    agreement: float
    entropy: float
    margin: float
    depth: int
    outlook: float = 0.0


@dataclass(frozen=True, slots=True)
class Proposals:
    """The draft's candidates after one node, best first, with the chance that the target agrees with each."""

    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    signals: Signals | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One token of the tree.

    reach: estimated probability that the target accepts the whole path from the root to this node.
    proposals: None until the draft has run over the node.
    """

    token: int
    parent: int = -1
    depth: int = 0
    reach: float = 1.0
    proposals: Proposals | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """Nodes in the order they were added: node 0 is the root (the last committed token), parents come first.

    position: the root's absolute position in the text, so node i stands at position + depth of i.
    """

    nodes: tuple[Node, ...]
    position: int

    @staticmethod
    def rooted(token: int, position: int) -> Tree:
        return Tree((Node(token),), position)

    def __len__(self) -> int:
        return len(self.nodes)

    def children(self, node: int) -> list[int]:
        """The children of `node`, in the order they were added."""
        return [i for i in range(node + 1, len(self.nodes)) if self.nodes[i].parent == node]

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if there is one."""
        return next((i for i in self.children(node) if self.nodes[i].token == token), None)

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the root to `node`, both included."""
        path = [node]
        while (node := self.nodes[node].parent) >= 0:
            path.append(node)
        return tuple(reversed(path))

    def best_path(self, start: int = 0) -> tuple[int, ...]:
        """The path that goes on from `start` to the likeliest child at every node; `start` included."""
        path = [start]
        while children := self.children(path[-1]):
            path.append(max(children, key=lambda i: self.nodes[i].reach))
        return tuple(path)

    def below(self, node: int) -> list[int]:
        """`node` and all its descendants, in the order they were added."""
        members = {node}
        for i in range(node + 1, len(self.nodes)):
            if self.nodes[i].parent in members:
                members.add(i)
        return sorted(members)

    def propose(self, node: int, proposals: Proposals) -> Tree:
        """This tree, with the draft's candidates noted at `node` (no children yet)."""
        nodes = list(self.nodes)
        nodes[node] = replace(nodes[node], proposals=proposals)
        return Tree(tuple(nodes), self.position)

    def branch(self, node: int, width: int) -> Tree:
        """This tree, with the first `width` candidates of `node` as its children (those there already stay)."""
        parent = self.nodes[node]
        if parent.proposals is None:
            raise ValueError(f"node {node} has no proposals yet: the draft has not run over it")
        known = {self.nodes[i].token for i in self.children(node)}
        candidates = zip(parent.proposals.tokens[:width], parent.proposals.confidence, strict=False)
        added = [
            Node(token, node, parent.depth + 1, parent.reach * confidence)
            for token, confidence in candidates
            if token not in known
        ]
        return Tree((*self.nodes, *added), self.position) if added else self

    def adopt(self, node: int, rank: int) -> Tree:
        """This tree, with candidate number `rank` of `node` as its newest child."""
        parent = self.nodes[node]
        assert parent.proposals is not None
        chance = parent.reach * parent.proposals.confidence[rank]
        return Tree((*self.nodes, Node(parent.proposals.tokens[rank], node, parent.depth + 1, chance)), self.position)

    def without(self, leaf: int) -> Tree:
        """This tree before `leaf`, its newest node, was added; a leaf that is not the newest stays."""
        return Tree(self.nodes[:-1], self.position) if leaf == len(self.nodes) - 1 else self

    def hang(self, node: int, token: int) -> Tree:
        """This tree, with `token` below `node` whatever the draft thinks of it."""
        parent = self.nodes[node]
        return Tree((*self.nodes, Node(token, node, parent.depth + 1, parent.reach)), self.position)

    def reroot(self, node: int) -> tuple[Tree, dict[int, int]]:
        """The subtree at `node` as a tree of its own, and the map from old to new indices of what survives."""
        kept = {old: new for new, old in enumerate(self.below(node))}
        top = self.nodes[node]
        nodes = tuple(
            replace(
                self.nodes[old],
                parent=kept.get(self.nodes[old].parent, -1),
                depth=self.nodes[old].depth - top.depth,
                reach=self.nodes[old].reach / top.reach if top.reach > 0 else 1.0,
            )
            for old in kept
        )
        return Tree(nodes, self.position + top.depth), kept

    def chance(self, node: int) -> float:
        """The estimated chance that the target agrees with `node`, given that it accepts its parent."""
        above = self.nodes[self.nodes[node].parent].reach
        return self.nodes[node].reach / above if above > 0 else 0.0

    def tokens(self, nodes: Iterable[int]) -> list[int]:
        return [self.nodes[i].token for i in nodes]
