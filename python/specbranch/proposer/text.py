"""The draft's side of one text: what is committed, the tree below it, and what was proposed of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specbranch.core.excerpt import ALL, Excerpt
from specbranch.core.messages import Drafted
from specbranch.core.sampling import Sampling
from specbranch.core.tree import Tree
from specbranch.drafters.model import ModelDrafter
from specbranch.policies.backoff import Backoff
from specbranch.policies.calibration import Calibrator
from specbranch.policies.policy import Expansion, InFlight, Policy, State
from specbranch.proposer.recognition import Tokens
from specbranch.runtime.runner import Runner
from specbranch.stages import Nodes


class Text:
    """One text of the engine.

    runner: the draft's, with a cache for this text alone; None while the draft is not to read it. excerpt: what of the
    text it was told to read. ready: whether it has. read_at: the call at which it began to, or read on. chain: the
    nodes that were proposed, the root first. seen: the newest call that it was a row of. new_tokens: committed since
    the first. saved: seconds, by its drafts so far; negative where they have lost some. Of the newest round: steps, of
    the draft; spent: seconds that the engine waited for them; retried: it was a trial of a draft that had not paid.
    failed: nothing is drafted for it any more.
    """

    def __init__(self, tokens: Tokens, calibrator: Calibrator | None) -> None:
        self._buffer = np.array(tokens, dtype=np.int32)
        self._length = len(tokens)
        self.calibrator = calibrator
        self.runner: Runner | None = None
        self.excerpt = ALL
        self.chain: list[int] = [0]
        self.backoff = Backoff()
        self.seen, self.new_tokens, self.failed = 0, 0, False
        self.saved, self.spent, self.steps, self.retried = 0.0, 0.0, 0, False
        self._drafter: ModelDrafter | None = None
        self._tree = Tree(int(tokens[-1]), len(tokens) - 1)
        self._room = 0
        self.ready, self.read_at = False, 0

    @property
    def tokens(self) -> Tokens:
        """Committed."""
        return self._buffer[: self._length]

    @property
    def tree(self) -> Tree:
        return self._tree

    @property
    def proposed(self) -> list[int]:
        """The tokens of the chain."""
        return self._tree.tokens(self.chain[1:])

    # ---- What the draft has read

    def fits(self, tokens: int) -> bool:
        """Whether the draft reads the text, or has read it, and its cache has room until the text has so many
        tokens."""
        return self._drafter is not None and tokens <= self._room

    def begin(self, runner: Runner, excerpt: Excerpt, room: int, policy: Policy, vocabulary: int) -> None:
        """The draft is to read the text, or its ends, but for the last token. room: tokens that its cache is to hold.
        What the cache holds of it already is not read again."""
        self.keep()
        self._drafter = ModelDrafter(runner, Sampling(), policy.candidates, vocabulary, self.calibrator)
        self._drafter.begin(self.tokens.tolist())
        self.runner, self.excerpt, self._room, self.ready = runner, excerpt, room, False
        self._tree, self.chain = Tree(int(self.tokens[-1]), len(self.tokens) - 1), [0]

    def read(self, most: float) -> int:
        """Read at least so many more tokens, if there are, and be ready when there are none. Returns how many."""
        assert self._drafter is not None
        count = self._drafter.read(self.excerpt, self._room, most)
        self.ready = self._drafter.unread(self.excerpt, self._room) == 0
        return count

    def forget(self) -> Runner | None:
        """The draft has read nothing of it. Returns the runner that it had."""
        runner, self.runner, self._drafter, self._room, self.ready = self.runner, None, None, 0, False
        self._tree, self.chain = Tree(int(self.tokens[-1]), len(self.tokens) - 1), [0]
        return runner

    def keep(self) -> None:
        """What the draft has read may serve a text that begins alike: the runner's model holds it as `kept`."""
        if self._drafter is not None:
            self._drafter.keep()

    # ---- Rounds

    def advance(self, tokens: Tokens, judged: bool) -> int:
        """More tokens are committed; what was drafted below the last one lives on. judged: they are the target's
        answer to the chain. Returns how many tokens of the chain are among them."""
        self._append(tokens)
        *before, last = tokens.tolist()
        tree, path = self._tree, [0]
        for token in before:
            if (child := tree.child(path[-1], token)) is None:
                break
            path.append(child)
        whole = len(path) == len(tokens)
        node = tree.child(path[-1], last) if whole else None
        survivors: dict[int, int] = {}
        if node is None:
            self._tree = Tree(last, len(self.tokens) - 1)
        else:
            self._tree, survivors = tree.reroot(node)
        accepted = sum(node in self.chain[1:] for node in path)
        self.chain = [0]
        if self._drafter is not None:
            self._drafter.commit(path, survivors, tokens.tolist())
            if whole and judged:
                self._drafter.learn(tree, path, last, None)
        return accepted

    def wanted(self, policy: Policy, state: State, during: bool) -> Expansion | None:
        """What the policy wants to draft next, as far as there is room; None for nothing. during: while the target
        verifies the chain."""
        if self._drafter is None:
            return None
        tree = self._tree
        wanted = policy.draft_during(tree, self.flight, state) if during else policy.draft_before(tree, state)
        if not wanted.choices:
            return None
        steps = min(wanted.steps, self._drafter.room // len(wanted.choices))
        return Expansion(wanted.choices, steps) if steps else None

    def take(self, expansion: Expansion) -> Nodes:
        """Where the draft is to run; a candidate becomes a node."""
        assert self._drafter is not None
        return self._drafter, self._tree, self._tree.take_all(expansion.choices)

    def grow(self, policy: Policy, nodes: Sequence[int], drafted: Drafted) -> None:
        """Make nodes of as many of the draft's candidates as the policy wants."""
        tree, flight = self._tree, self.flight
        for node in tree.descend(nodes, drafted.proposals):
            if width := policy.width(tree, node, flight):
                tree.branch(node, width)
        self.steps += len(drafted.steps)

    def choose(self, policy: Policy, state: State, most: int) -> None:
        """Choose the chain that is proposed, at most so many tokens."""
        choices = policy.choose_trunk(self._tree, state).choices[: most + 1]
        self.chain = [self._tree.take(choice) for choice in choices]

    @property
    def flight(self) -> InFlight:
        """What the target verifies."""
        return InFlight(tuple(self.chain), self.chain[-1])

    def _append(self, tokens: Tokens) -> None:
        length = self._length + len(tokens)
        if length > len(self._buffer):
            larger = np.empty(2 * length, dtype=np.int32)
            larger[: self._length] = self.tokens
            self._buffer = larger
        self._buffer[self._length : length] = tokens
        self._length = length
        self.new_tokens += len(tokens)
