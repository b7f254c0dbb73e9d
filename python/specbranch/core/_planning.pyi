"""The compiled tree, calibration and look-ups in texts: csrc/planning binds csrc/tree and csrc/retrieval. In plain
Python: tests/support/plain_tree.py, plain_calibration.py and plain_suffix_index.py."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from specbranch.core.tree import Choice, Proposals, Signals

def use(choice: type[Choice], proposals: type[Proposals], signals: type[Signals]) -> None:
    """The classes of the values; core/tree.py calls it."""

class ProposalRows:
    """Proposals of a draft's run, [steps][nodes], without a Python object for each."""

    def add(
        self,
        tokens: Sequence[Sequence[int]],
        scores: Sequence[Sequence[float]],
        confidence: Sequence[Sequence[float]] | None,
        entropy: Sequence[float],
        depths: Sequence[int],
        forecast: tuple[float, float],
    ) -> None:
        """A step: `draft_sample`'s results at some nodes, and their depths. confidence: the draft's probabilities where
        those are the confidence (at temperature 0); None: a softmax of the perturbed scores, the estimated chance that
        the target, under the same noise, picks each candidate. forecast: Signals.forecast at the root, and elsewhere.
        Raises ValueError for a row without candidates."""
    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> list[Proposals]: ...
    def __iter__(self) -> Iterator[list[Proposals]]: ...

class Tree:
    """See specbranch.core.tree.Tree."""

    def __init__(self, token: int, position: int) -> None: ...
    def __len__(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def token(self) -> list[int]: ...
    @property
    def parent(self) -> list[int]: ...
    @property
    def depth(self) -> list[int]: ...
    @property
    def reach(self) -> list[float]: ...
    @property
    def proposals(self) -> Sequence[Proposals | None]: ...
    @property
    def children(self) -> Sequence[list[int]]: ...

    # ---- Growing

    def add(self, parent: int, token: int, reach: float, free: bool = False) -> int:
        """Append a node; returns its index. free: until a model runs over it."""
    def force(self, node: int, tokens: Sequence[int]) -> int:
        """Add the tokens that must follow a node, one behind the other, as likely as the node; those that are children
        already become as likely. Returns the last node."""
    def take(self, choice: Choice) -> int:
        """The node of a choice; a candidate becomes one."""
    def take_all(self, choices: Sequence[Choice]) -> list[int]:
        """`take` each, in order."""
    def note(self, node: int, proposals: Proposals) -> None:
        """Keep what the draft proposes after `node`; no candidate becomes a node yet."""
    def descend(self, nodes: Sequence[int], proposals: ProposalRows | Sequence[Sequence[Proposals]]) -> list[int]:
        """Note a draft's run: proposals[0] at `nodes`, proposals[1] at the first candidates there, and so on.

        Those candidates become nodes, in that order. Returns all the nodes where something was noted.
        """
    def branch(self, node: int, width: int) -> None:
        """Make nodes of the first `width` candidates of `node`; those that are nodes already stay."""
    def graft(self, node: int, found: Continuations, chances: Sequence[float], least: float) -> int:
        """Add what was retrieved after a node, as far as its reach is at least `least`; a token that is a child already
        stays as it is. chances: Calibrator.chances. Returns how many nodes there are more."""
    def use(self, nodes: Sequence[int]) -> int:
        """A model is to run over some nodes. Returns how many were free until now."""
    def adopt(self, other: Tree, node: int) -> dict[int, int]:
        """Of a tree with a root only: become the subtree at `node` of another tree. Returns the map from old to new
        indices of what survives."""

    # ---- Asking

    def tokens(self, nodes: Sequence[int]) -> list[int]: ...
    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if there is one."""
    def path(self, node: int) -> list[int]:
        """The nodes from the root to `node`, both included."""
    def best_path(self, start: int = 0) -> list[int]:
        """The path that goes on from `start` to the likeliest child at every node; `start` included."""
    def best_choices(self, start: int = 0) -> list[Choice]:
        """The best path as choices. It ends with a draft's first candidate that is no node yet, if no node beside that
        is likelier."""
    def below(self, node: int) -> list[int]:
        """`node` and all its descendants, in the order they were added."""
    def free_nodes(self) -> list[int]:
        """The nodes that no draft proposed and no model has run over."""
    def read(self, path: Sequence[Choice]) -> int:
        """How many of the first choices of a path the draft has run over."""
    def with_unread(self, choices: Sequence[Choice]) -> list[Choice]:
        """The choices, each behind those nodes above it that the draft has not run over; none of them twice."""
    def retrieved(self, node: int) -> bool:
        """Whether it was."""
    def forced(self, node: int) -> bool:
        """Whether nothing else can follow its parent."""
    def is_bound(self, node: int) -> bool:
        """Whether nothing but one of its children can follow a node."""
    def retrieved_odds(self, node: int, token: int) -> float:
        """Log-odds that what was retrieved after a node gives to a token, as far as they are worth more than none;
        those of another token speak against it. 0 where nothing was retrieved."""
    def relate(self, proposals: ProposalRows, nodes: Sequence[int]) -> None:
        """Let the first step of a draft's run over some nodes say what was retrieved there: Signals.retrieved."""
    def depth_of(self, choice: Choice) -> int:
        """The depth of the node that a choice is or would be."""
    def deepest(self, choices: Sequence[Choice]) -> int:
        """The depth of the deepest choice; 0 without one."""
    def reach_of(self, choice: Choice) -> float:
        """The estimated probability that the target accepts the path down to a choice."""
    def reaches(self, choices: Sequence[Choice]) -> list[float]:
        """`reach_of` each."""
    def chance_of(self, choice: Choice) -> float:
        """The same, given that it accepts the parent."""
    def chances(self, choices: Sequence[Choice]) -> list[float]:
        """`chance_of` each."""
    def untried(self, node: int, ranks: int) -> list[tuple[float, Choice]]:
        """The first `ranks` candidates of `node` that are no nodes yet, best first, with the reach of each."""
    def undrafted(self, depth: int) -> list[tuple[float, Choice]]:
        """The nodes above `depth` that the draft has not run over, with the reach of each."""
    def offers(self, node: int, ranks: int, least: float) -> list[tuple[float, Choice]]:
        """What is or could be below `node` with a reach above `least`, and that reach: its children, then its first
        `ranks` candidates that are no nodes yet."""
    def likeliest(self, count: int, depth: int, ranks: int) -> list[tuple[float, Choice]]:
        """The `count` likeliest places to draft at, in order, with the reach of each: nodes above `depth` that the
        draft has not run over, and those of the first `ranks` candidates after such a node that are no nodes yet."""

class Calibrator:
    """See specbranch.policies.calibration.Calibrator."""

    def __init__(self) -> None: ...
    def state(self) -> dict[str, Any]:
        """What it has learned, ready for JSON; `restore` takes it."""
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the calibrator did that gave `state`. Raises ValueError for what no calibrator gives."""
    @overload
    def correct(self, proposals: ProposalRows) -> ProposalRows:
        """The draft's proposals with the chance, for each candidate, that the target picks it. Raises ValueError for
        some without signals or candidates."""
    @overload
    def correct(self, proposals: Sequence[Proposals]) -> list[Proposals]: ...
    def learn(self, signals: Signals, accepted: bool, covered: bool) -> None:
        """One label: whether the target's token was the first candidate there, or (covered) any candidate."""
    def observe(self, tree: Tree, path: Sequence[int], next_token: int) -> None:
        """Take a verdict's labels: at every accepted node, the root first, the token that the target went on with."""
    def chances(self, found: Continuations) -> list[float]:
        """The chance that the target picks each retrieved token, if it picks those before it; of siblings together at
        most 1."""
    def observe_retrieved(self, tree: Tree, path: Sequence[int], next_token: int) -> None:
        """Take a verdict's labels for what was retrieved below the accepted nodes."""

class SuffixIndex:
    """Where the newest tokens of a text occurred before: its tokens, and the order of all its prefixes.

    A prefix is named by its last position. Prefixes are ordered by their tokens read backwards, at most 64 of them; one
    that runs out of text comes first, and equal ones come by position. What is appended changes no prefix, so a text
    may grow: new positions wait in a tail without order until there are max(256, a 1024th of the text) of them, and
    are then merged. 8 bytes a token; while it is built 28.

    tokens: ids from 0 to 2^31 - 2, at most as many; soonest read from a buffer of int32 or int64 (an array of numpy).
    Raises ValueError for another. Other threads run while it is built.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None: ...
    @staticmethod
    def mapped(tokens: Any, order: Any) -> SuffixIndex:
        """Over the tokens and the order of another index: contiguous buffers of int32 (of a mapped file, say), which
        are kept and not copied.

        Nothing of them is read here. An entry of the order that is no position raises ValueError when a look-up comes
        upon it, and so does a token that is none; `check` finds any other mistake. Raises ValueError for another type
        or length.
        """
    def __len__(self) -> int: ...
    @property
    def tokens(self) -> memoryview:
        """The tokens as int32, to be read only, without a copy."""
    @property
    def order(self) -> memoryview:
        """The last positions of all prefixes, in order, likewise; the tail is merged first."""
    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens. Raises ValueError for some that are none, of which nothing is appended, and of a mapped index;
        BufferError while a view of the tokens or the order is in use."""
    def check(self) -> bool:
        """Whether the order is one (every position once, each where it belongs; without the tail) and the tokens are
        some. Reads everything."""

class Continuations:
    """What followed earlier occurrences, as a trie: a node for each token that followed something, in columns, level by
    level.

    token: the node's. parent: its parent's place, -1 where that is the context's end. match: how many tokens before
    this one are as in the context and the nodes above, where that is longest, at most 64. count: the occurrences that
    go through the node. total: those that go through its parent (or all, for a first token), whether or not they go on.
    source: the place, among the indexes, of the best of its occurrences; position: where the token stands there. near:
    1 where one of its occurrences is near what was expected, else 0.

    Siblings: those that are near first, then the longest match, then the highest count, then the best occurrence.
    """

    def __len__(self) -> int: ...
    @property
    def token(self) -> list[int]: ...
    @property
    def parent(self) -> list[int]: ...
    @property
    def match(self) -> list[int]: ...
    @property
    def count(self) -> list[int]: ...
    @property
    def total(self) -> list[int]: ...
    @property
    def source(self) -> list[int]: ...
    @property
    def position(self) -> list[int]: ...
    @property
    def near(self) -> list[int]: ...

def continuations(
    indexes: Sequence[SuffixIndex],
    context: Iterable[int],
    drafted: int = 0,
    *,
    occurrences: int = 32,
    depth: int = 64,
    least_match: int = 1,
    most_nodes: int = 240,
    near: tuple[int, int, int] | None = None,
) -> Continuations:
    """What followed the earlier occurrences of a context's end.

    indexes: the text's own first, then others. context: its newest tokens, of which the last 64 count; the last
    `drafted` of them are not in indexes[0], which holds all before them.

    An occurrence is a position of an index with a next token, and its match the number of tokens, read backwards from
    there, that are those at the context's end: at most 64, and at least `least_match`. The last position of indexes[0]
    has a next token if something is drafted; else it is the context's own.

    Looked at are, of each index, the whole tail, and of the order `occurrences` entries on each side of the place where
    the context would stand, behind those that equal it; a position without a next token is passed over. near: (index,
    first, last), positions of one index that are looked at in any case: where the text goes on, say, that was copied
    from. Taken are the best `occurrences` of all: those that are near first, then the longest match, then the earlier
    index, then the later position.

    An occurrence's run is what follows it, at most `depth` tokens. In indexes[0] it goes on from the end of the text
    through the drafted tokens, and then through itself, as a copy in LZ77 does: a text that repeats itself is continued
    for as long as one likes. Elsewhere it ends with the tokens.

    The runs become a trie, the best first, of at most `most_nodes` nodes: where there is no room for another a run
    ends, and later ones still count in the nodes that they share. Raises ValueError for arguments out of range, and for
    what it reads of a mapped index that cannot be.
    """
