"""The speculation tree: drafted tokens below the last committed token."""

from __future__ import annotations

from typing import NamedTuple

try:
    from specbranch.core import _planning
except ImportError as error:
    raise ImportError(
        "specbranch was imported without its compiled module `specbranch.core._planning`. Build it with "
        f"`pip install .` or, to work on the source, `pip install -e .` in the repository root. The cause: {error}"
    ) from error

ProposalRows = _planning.ProposalRows
MOST_NODES = 240  # that a draft may run over between two commits


class Signals(NamedTuple):
    """What the draft's logits show at one node, before calibration.

    agreement: the estimated chance that the target picks the first candidate (a softmax of perturbed scores; at
    temperature 0 the draft's probability). entropy: of the draft's distribution, in nats. margin: score of the first
    candidate less that of the second. depth: the node's, in the tree where the draft ran over it. forecast: log-odds
    that a learned predictor gave the first candidate; 0 without one. retrieved: log-odds that what was retrieved gives
    it, see Tree.retrieved_odds; 0 where nothing was.
    """

    agreement: float
    entropy: float
    margin: float
    depth: int
    forecast: float = 0.0
    retrieved: float = 0.0


class Proposals(NamedTuple):
    """The draft's candidates after one node, best first, with the probability that the target picks each."""

    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    signals: Signals | None = None


class Choice(NamedTuple):
    """A place to draft at or a token to verify: a node, or with a rank that candidate of the node."""

    node: int
    rank: int = -1


_planning.use(Choice, Proposals, Signals)


class Tree(_planning.Tree):
    """Nodes as columns that only grow; node 0 is the root (the last committed token), and parents come first.

    position: the root's in the text, so node i stands at position + depth[i]. token, parent, depth: of each node.
    reach: estimated probability that the target accepts the whole path from the root to the node. proposals: None until
    the draft has run over the node. children: in the order they were added. All of them are to be read only.

    Nodes may be retrieved: tokens that followed the same text elsewhere; and they may be forced: nothing else can
    follow their parent. They have a reach before any draft has run, and are free until a model runs over them.

    The frontier is a heap of what could be drafted next, likeliest first: nodes without proposals, and candidates that
    are no nodes yet. Entries go stale when their turn is over, and are dropped when they come up.

    Its methods are compiled (csrc/tree), and described in _planning.pyi. A node or a rank that is none raises
    IndexError, candidates of a node without proposals ValueError.
    """

    __slots__ = ()

    def reroot(self, node: int) -> tuple[Tree, dict[int, int]]:
        """The subtree at `node` as a tree of its own, and the map from old to new indices of what survives."""
        tree = Tree(0, 0)
        return tree, tree.adopt(self, node)
