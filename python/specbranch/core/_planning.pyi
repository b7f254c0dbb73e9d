"""The compiled tree and calibration: csrc/planning binds csrc/tree. In plain Python: tests/support/plain_tree.py and
plain_calibration.py."""

from collections.abc import Iterator, Mapping, Sequence
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

    def add(self, parent: int, token: int, reach: float) -> int:
        """Append a node; returns its index."""
    def take(self, choice: Choice) -> int:
        """The node of a choice; a candidate becomes one."""
    def note(self, node: int, proposals: Proposals) -> None:
        """Keep what the draft proposes after `node`; no candidate becomes a node yet."""
    def descend(self, nodes: Sequence[int], proposals: ProposalRows | Sequence[Sequence[Proposals]]) -> list[int]:
        """Note a draft's run: proposals[0] at `nodes`, proposals[1] at the first candidates there, and so on.

        Those candidates become nodes, in that order. Returns all the nodes where something was noted.
        """
    def branch(self, node: int, width: int) -> None:
        """Make nodes of the first `width` candidates of `node`; those that are nodes already stay."""
    def adopt(self, other: Tree, node: int) -> dict[int, int]:
        """Of a tree with a root only, with the token of a node of another tree: take over what lies below that.
        Returns the map from old to new indices."""

    # ---- Asking

    def tokens(self, nodes: Sequence[int]) -> list[int]: ...
    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if there is one."""
    def path(self, node: int) -> list[int]:
        """The nodes from the root to `node`, both included."""
    def best_path(self, start: int = 0) -> list[int]:
        """The path that goes on from `start` to the likeliest child at every node; `start` included."""
    def best_choices(self, start: int = 0) -> list[Choice]:
        """The best path as choices; at its end the draft's newest first candidate, if that is no node yet."""
    def below(self, node: int) -> list[int]:
        """`node` and all its descendants, in the order they were added."""
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
