"""Trees made by hand, and a model's forward over one."""

from collections.abc import Sequence
from typing import Any

from specbranch.core.suffix_index import SuffixIndex, continuations
from specbranch.core.tree import ProposalRows, Proposals, Tree
from specbranch.runtime.batch import Batch
from specbranch.runtime.model import CachedModel

STEP: dict[str, Any] = {
    "tokens": [[1, 2]],
    "scores": [[1.0, 0.5]],
    "confidence": [[0.5, 0.25]],
    "entropy": [1.0],
    "depths": [0],
    "forecast": (0.0, 0.0),
}


def tree_of(*nodes: tuple[int, int, float], token: int = 0, position: int = 0) -> Tree:
    """A tree from (token, parent, reach) of every node but the root."""
    tree = Tree(token, position)
    for child, parent, reach in nodes:
        tree.add(parent, child, reach)
    return tree


def run_of_one_row() -> ProposalRows:
    rows = ProposalRows()
    rows.add(**STEP)
    return rows


def propose(tree: Tree, node: int, tokens: Sequence[int], confidence: Sequence[float]) -> None:
    tree.note(node, Proposals(tuple(tokens), tuple(confidence)))


def retrieve(tree: Tree, node: int, *run: tuple[int, float]) -> list[int]:
    """Graft a run of (token, chance) behind a node. Returns its nodes."""
    size, tokens = len(tree), [token for token, _ in run]
    text = SuffixIndex([tree.token[node], *tokens])
    found = continuations([SuffixIndex(), text], [tree.token[node]], occurrences=1, near=(1, 0, 0))
    tree.graft(node, found, [chance for _, chance in run], 0.0)
    return list(range(size, len(tree)))


def place(cached: CachedModel, tree: Tree, nodes: Sequence[int], backlog: Sequence[int] = ()) -> Batch:
    """The next forward over `nodes` of the tree."""
    parents = [tree.parent[node] for node in nodes]
    positions = [tree.position + tree.depth[node] for node in nodes]
    return cached.place(nodes, parents, tree.tokens(nodes), positions, backlog)
