"""The speculation tree: drafted tokens below the last committed token.

A tree is a value. Growing or re-rooting it returns another tree; node indices stay valid while it grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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


class Proposals(NamedTuple):
    """The draft's candidates after one node, best first, with the chance that the target agrees with each."""

    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    signals: Signals | None = None


class Node(NamedTuple):
    """One token of the tree.

    reach: estimated probability that the target accepts the whole path from the root to this node.
    proposals: None until the draft has run over the node.
    """

    token: int
    parent: int = -1
    depth: int = 0
    reach: float = 1.0
    proposals: Proposals | None = None


@dataclass(frozen=True)
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

    @cached_property
    def _children(self) -> list[list[int]]:
        children: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            if node.parent >= 0:
                children[node.parent].append(i)
        return children

    def children(self, node: int) -> Sequence[int]:
        """The children of `node`, in the order they were added."""
        return self._children[node]

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
        path, nodes, below = [start], self.nodes, self._children
        while children := below[path[-1]]:
            path.append(children[0] if len(children) == 1 else max(children, key=lambda i: nodes[i].reach))
        return tuple(path)

    def below(self, node: int) -> list[int]:
        """`node` and all its descendants, in the order they were added."""
        members = [node]
        for member in members:
            members.extend(self._children[member])
        return sorted(members)

    def propose(self, found: Mapping[int, Proposals]) -> Tree:
        """This tree, with the draft's candidates noted at some nodes (no children yet)."""
        nodes = list(self.nodes)
        for node, proposals in found.items():
            nodes[node] = nodes[node]._replace(proposals=proposals)
        tree = Tree(tuple(nodes), self.position)
        tree.__dict__["_children"] = self._children
        return tree

    def branch(self, widths: Mapping[int, int]) -> Tree:
        """This tree, with candidates of some nodes as their children: the first ones, as many as `widths` says (those
        there already stay)."""
        added = []
        for node, width in widths.items():
            parent = self.nodes[node]
            if parent.proposals is None:
                raise ValueError(f"node {node} has no proposals yet: the draft has not run over it")
            known = {self.nodes[i].token for i in self.children(node)} if width else set()
            candidates = zip(parent.proposals.tokens[:width], parent.proposals.confidence, strict=False)
            added += [
                Node(token, node, parent.depth + 1, parent.reach * confidence)
                for token, confidence in candidates
                if token not in known
            ]
        return Tree((*self.nodes, *added), self.position) if added else self

    def adopt(self, node: int, rank: int) -> Tree:
        """This tree, with candidate number `rank` of `node` as its newest child."""
        return self.adopt_all([(node, rank)])

    def adopt_all(self, chosen: Iterable[tuple[int, int]]) -> Tree:
        """This tree, with the chosen candidates, (node, rank), as new nodes in that order."""
        nodes, children = list(self.nodes), list(self._children)
        for node, rank in chosen:
            parent = nodes[node]
            assert parent.proposals is not None
            chance = parent.reach * parent.proposals.confidence[rank]
            children[node] = [*children[node], len(nodes)]
            children.append([])
            nodes.append(Node(parent.proposals.tokens[rank], node, parent.depth + 1, chance))
        tree = Tree(tuple(nodes), self.position)
        tree.__dict__["_children"] = children
        return tree

    def descend(self, nodes: Sequence[int], found: Sequence[Sequence[Proposals]]) -> tuple[Tree, list[int]]:
        """This tree with candidates noted at `nodes`, found[0], then at the first of those, found[1], and so on; and
        all the nodes where some were noted."""
        grown, below, everywhere = list(self.nodes), list(nodes), list(nodes)
        for step, proposals in enumerate(found):
            if step:
                first = len(grown)
                for node in below:
                    parent = grown[node]
                    assert parent.proposals is not None
                    chance = parent.reach * parent.proposals.confidence[0]
                    grown.append(Node(parent.proposals.tokens[0], node, parent.depth + 1, chance))
                below = list(range(first, len(grown)))
                everywhere += below
            for node, said in zip(below, proposals, strict=True):
                grown[node] = grown[node]._replace(proposals=said)
        return Tree(tuple(grown), self.position), everywhere

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
        nodes = []
        for old in kept:
            token, parent, depth, reach, proposals = self.nodes[old]
            reach = reach / top.reach if top.reach > 0 else 1.0
            nodes.append(Node(token, kept.get(parent, -1), depth - top.depth, reach, proposals))
        return Tree(tuple(nodes), self.position + top.depth), kept

    def chance(self, node: int) -> float:
        """The estimated chance that the target agrees with `node`, given that it accepts its parent."""
        above = self.nodes[self.nodes[node].parent].reach
        return self.nodes[node].reach / above if above > 0 else 0.0

    def tokens(self, nodes: Iterable[int]) -> list[int]:
        return [self.nodes[i].token for i in nodes]
