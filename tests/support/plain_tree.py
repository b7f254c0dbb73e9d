"""The speculation tree in plain Python: what the compiled one (csrc/tree/tree.h) is defined by, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import takewhile
from typing import NamedTuple

from specbranch.core.suffix_index import Continuations
from specbranch.core.tree import Choice, ProposalRows, Proposals


class Found(NamedTuple):
    """What speaks for a retrieved token: see csrc/tree/found.h."""

    match: int
    occurrences: int
    total: int
    source: int
    near: bool
    first: bool


def found_at(found: Continuations, i: int) -> Found:
    first = found.parent[i] not in found.parent[:i]
    return Found(found.match[i], found.count[i], found.total[i], found.source[i], bool(found.near[i]), first)


class PlainTree:
    """See specbranch.core.tree.Tree."""

    __slots__ = (
        "_frontier",
        "_offered",
        "children",
        "depth",
        "forced_nodes",
        "found",
        "free",
        "parent",
        "position",
        "proposals",
        "reach",
        "token",
    )

    def __init__(self, token: int, position: int) -> None:
        self.position = position
        self.token, self.parent, self.depth = [token], [-1], [0]
        self.reach = [1.0]
        self.proposals: list[Proposals | None] = [None]
        self.children: list[list[int]] = [[]]
        self._frontier = [(-1.0, 0, -1)]  # (-reach, node, rank)
        self._offered = [1]  # by node: the highest rank in the frontier
        self.found: dict[int, tuple[Found, float]] = {}  # by retrieved node: what speaks for it, and its chance
        self.free: set[int] = set()
        self.forced_nodes: set[int] = set()

    def __len__(self) -> int:
        return len(self.token)

    # ---- Growing

    def add(self, parent: int, token: int, reach: float, free: bool = False) -> int:
        """Append a node; returns its index. free: until a model runs over it."""
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
        if free:
            self.free.add(node)
        return node

    def force(self, node: int, tokens: Sequence[int]) -> int:
        """Add the tokens that must follow a node, one behind the other, as likely as the node; those that are children
        already become as likely. Returns the last node."""
        for token in tokens:
            above = self.reach[node]
            if (known := self.child(node, token)) is None:
                node = self.add(node, token, above, free=True)
            else:
                node = known
                if self.reach[node] > 0:
                    self._scale(node, above / self.reach[node])
            self.forced_nodes.add(node)
        return node

    def take(self, choice: Choice) -> int:
        """The node of a choice; a candidate becomes one."""
        if choice.rank < 0:
            return choice.node
        return self.add(choice.node, self._at(choice.node).tokens[choice.rank], self.reach_of(choice))

    def take_all(self, choices: Sequence[Choice]) -> list[int]:
        """`take` each, in order."""
        return [self.take(choice) for choice in choices]

    def note(self, node: int, proposals: Proposals) -> None:
        """Keep what the draft proposes after `node`; no candidate becomes a node yet."""
        self._keep(node, proposals)
        for child in self.children[node]:
            if child in self.found and child not in self.forced_nodes and self.reach[child] > 0:
                chance = self._chance_after(node, self.token[child], self.found[child][1])
                self._scale(child, self.reach[node] * chance / self.reach[child])

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

    def graft(self, node: int, found: Continuations, chances: Sequence[float], least: float) -> int:
        """Add what was retrieved after a node, as far as its reach is at least `least`; a token that is a child already
        stays as it is. Returns how many nodes there are more."""
        if len(chances) != len(found):
            raise ValueError("chances: expected one for each token")
        before = len(self)
        place: list[int | None] = []
        for i, (token, parent, chance) in enumerate(zip(found.token, found.parent, chances, strict=True)):
            above = node if parent < 0 else place[parent]
            place.append(None)
            if above is None:
                continue
            if (known := self.child(above, token)) is not None:
                place[i] = known
                continue
            reach = self.reach[above] * self._chance_after(above, token, chance)
            if reach >= least:
                added = place[i] = self.add(above, token, reach, free=True)
                self.found[added] = found_at(found, i), chance
        return len(self) - before

    def use(self, nodes: Sequence[int]) -> int:
        """A model is to run over some nodes. Returns how many were free until now."""
        fresh = self.free & {*nodes}
        self.free -= fresh
        return len(fresh)

    def reroot(self, node: int) -> tuple[PlainTree, dict[int, int]]:
        """The subtree at `node` as a tree of its own, and the map from old to new indices of what survives."""
        kept = {old: new for new, old in enumerate(self.below(node))}
        tree = PlainTree(self.token[node], self.position + self.depth[node])
        top = self.reach[node]
        for old, new in kept.items():
            if new:
                tree.add(kept[self.parent[old]], self.token[old], self.reach[old] / top if top > 0 else 1.0)
                if old in self.found:
                    tree.found[new] = self.found[old]
                if old in self.free:
                    tree.free.add(new)
                if old in self.forced_nodes:
                    tree.forced_nodes.add(new)
        for old, new in kept.items():
            if (proposals := self.proposals[old]) is not None:
                tree._keep(new, proposals)
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
        """The best path as choices. It ends with a draft's first candidate that is no node yet, if no node beside that
        is likelier."""
        path: list[Choice] = []
        for node in self.best_path(start):
            path.append(Choice(node))
            if self.proposals[node] and not self._is_child(node, 0):
                children = [self.reach[child] for child in self.children[node]]
                if not children or self.reach_of(Choice(node, 0)) > max(children):
                    return [*path, Choice(node, 0)]
        return path

    def free_nodes(self) -> list[int]:
        """The nodes that no draft proposed and no model has run over."""
        return sorted(self.free)

    def read(self, path: Sequence[Choice]) -> int:
        """How many of the first choices of a path the draft has run over."""
        return len([*takewhile(lambda choice: choice.rank < 0 and self.proposals[choice.node] is not None, path)])

    def with_unread(self, choices: Sequence[Choice]) -> list[Choice]:
        """The choices, each behind those nodes above it that the draft has not run over; none of them twice."""
        every: list[Choice] = []
        for choice in choices:
            above = self.path(choice.node)[-2::-1]
            unread = list(takewhile(lambda node: self.proposals[node] is None, above))[::-1]
            every += [Choice(node) for node in unread if Choice(node) not in every]
            if choice.rank >= 0 or choice not in every:
                every.append(choice)
        return every

    def retrieved(self, node: int) -> bool:
        return node in self.found

    def forced(self, node: int) -> bool:
        return node in self.forced_nodes

    def is_bound(self, node: int) -> bool:
        return any(child in self.forced_nodes for child in self.children[node])

    def retrieved_odds(self, node: int, token: int) -> float:
        """Log-odds that what was retrieved after a node gives to a token, as far as they are worth more than none;
        those of another token speak against it. 0 where nothing was retrieved."""
        retrieved = [child for child in self.children[node] if child in self.found]
        if not retrieved:
            return 0.0
        best = max(retrieved, key=lambda child: self.found[child][1])
        chance = min(max(self.found[best][1], 0.02), 0.98)
        odds = math.log(chance / (1 - chance)) + 1
        return odds if self.token[best] == token else -odds

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
            if cost != self._cost_of(node, rank) or entry in kept:
                continue  # of a reach that it had, or there twice
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

    def _cost_of(self, node: int, rank: int) -> float:
        """That an entry for the place would have now."""
        reach = self.reach[node]
        return -reach if rank < 0 else -(reach * self._at(node).confidence[rank])

    def _keep(self, node: int, proposals: Proposals) -> None:
        self.proposals[node] = proposals
        for rank in range(min(2, len(proposals.tokens))):
            self._offer(node, rank)

    def _chance_after(self, node: int, token: int, chance: float) -> float:
        """The chance that `token` follows a node, where `chance` was said of it before the draft ran over the node:
        what the draft says, and if it does not name the token, that it is wrong."""
        if (proposals := self.proposals[node]) is None:
            return chance
        if token in proposals.tokens:
            return proposals.confidence[proposals.tokens.index(token)]
        return chance * max(0.0, 1 - sum(proposals.confidence))

    def _scale(self, node: int, factor: float) -> None:
        """Another reach for all that is below a node, and for the node."""
        if factor == 1:
            return
        for each in self.below(node):
            self.reach[each] *= factor
            heappush(self._frontier, (-self.reach[each], each, -1))
            if self.proposals[each] is not None:
                for rank in range(self._offered[each] + 1):
                    self._offer(each, rank)

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
