"""One text on its way: its tree, its models, and what it has learned of them. The rounds are in loop.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specbranch.core.excerpt import ALL, Excerpt
from specbranch.core.messages import Drafted, Forecast, Trunk, Verdict
from specbranch.core.stats import Stats
from specbranch.core.tree import Tree
from specbranch.policies.backoff import Backoff
from specbranch.policies.costs import Costs
from specbranch.policies.policy import Expansion, InFlight, Policy, State
from specbranch.policies.reading import AtOnce, Reading, Unread
from specbranch.stages import Drafter, Nodes, Verifier, Workers

READ_ALL = AtOnce(ALL)


class Decoding:
    """Decodes one text, in rounds; only `commit` changes what the two models hold.

    overlap: True, False, or None to take what the costs prefer. reading: when the draft reads, and what. costs: of the
    rounds to come. tree: its root is the last committed token. remaining: tokens that may still be committed. read_at:
    when it began, or was read on. excerpt: what the draft is to read, once that is decided. drafting: whether it has;
    before that, decoding is autoregressive. saved: seconds, by drafting in this text so far; negative where it has lost
    some.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafter: Drafter | None,
        policy: Policy,
        costs: Costs,
        workers: Workers,
        overlap: bool | None,
        reading: Reading = READ_ALL,
    ) -> None:
        self.verifier, self.drafter, self.policy = verifier, drafter, policy
        self.costs, self.workers, self.overlap, self.reading = costs, workers, overlap, reading
        self.tree, self.remaining = Tree(0, 0), 0
        self.excerpt: Excerpt | None = None
        self.drafting = False
        self.saved = 0.0
        self.backoff = Backoff()
        self.forecast: Forecast | None = None
        self.stats = Stats(method=policy.name)
        self.read_at = 0.0
        self._unread = 0  # of the prompt, by the target
        self._prompt_tokens = 0
        self._lessons: list[tuple[Tree, list[int], Verdict]] = []

    # ---- Prompts

    def begin(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """The last token of the prompt is the root. Nothing is read yet."""
        self._unread = self.verifier.begin(prompt)
        if self.drafter is not None:
            self.drafter.begin(prompt)
        self.stats.prompt_tokens, self.stats.reused_tokens = len(prompt), len(prompt) - 1 - self._unread
        self._prompt_tokens, self.remaining = len(prompt), max_new_tokens
        self.tree = Tree(prompt[-1], len(prompt) - 1)
        self.read_at = self.workers.clock()

    @property
    def ready(self) -> bool:
        """Whether the target has read the prompt, so that rounds may follow."""
        return self._unread == 0

    def read_prompt(self, most: float = math.inf) -> int:
        """Have the target read at least so many more tokens of the prompt, if there are. Returns how many."""
        if self.ready:
            return 0
        begin = self.workers.clock()
        count = self.verifier.read(most)
        self.workers.wait()
        self.read_at = self.workers.clock()
        seconds = self.read_at - begin
        self._unread -= count
        self.stats.prefill_seconds += seconds
        self.costs.record_prompt(count, seconds)
        return count

    def unread(self) -> Unread | None:
        """What the draft may read, where that is still to be decided."""
        if self.drafter is None or self.excerpt is not None or not self.ready:
            return None
        tokens = {excerpt: self.drafter.unread(excerpt, self._end) for excerpt in self.reading.excerpts}
        return Unread(self.costs, tokens, self.remaining)

    def read_draft(self, most: float = math.inf) -> int:
        """Have the draft read at least so many more tokens of the excerpt and of what follows, if there are. Returns
        how many."""
        if self.drafter is None or self.excerpt is None or self.drafting:
            return 0
        end, begin = self._end, self.workers.clock()
        count = self.drafter.read(self.excerpt, end, most)
        self.workers.wait()
        self.read_at = self.workers.clock()
        seconds = self.read_at - begin
        self.costs.record_reading(count, seconds)
        self.stats.add_reading(self._prompt_tokens - len(self.drafter.gap(self.excerpt, end)), seconds)
        self.drafting = self.drafter.unread(self.excerpt, end) == 0
        if self.drafting:
            self.costs.end_waiting()
        return count

    @property
    def _end(self) -> int:
        """Tokens of the text, if it gets as many as it may."""
        return self.tree.position + 1 + self.remaining

    # ---- Decisions

    @property
    def may_overlap(self) -> bool:
        return self.policy.overlaps and self.drafting

    def choose_overlap(self, saved: float) -> bool:
        """Whether the draft is to go on beside the target, in the round to come. saved: by drafting, in all its
        texts."""
        saved = saved if self.policy.thrifty else math.inf
        return self.costs.choose_overlap(saved) if self.overlap is None else self.overlap

    def state(self, overlapped: bool) -> State:
        """What the policy looks at. overlapped: the round is."""
        mode = self.costs.mode(overlapped)
        remaining = min(self.remaining, self.verifier.most_tokens(self.tree.position))
        losing = -self.saved > self.costs.bearable_loss(self.stats.new_tokens)
        burst = 1 if self.drafter is None else min(self.drafter.burst, mode.burst())
        retry = self.backoff.over(mode.step_price())
        mine = overlapped and self.may_overlap
        return State(mine, mode, self.costs.acceptance, remaining, retry, burst, self.forecast, losing)

    def steps(self, expansion: Expansion) -> int:
        """How many of the steps that the policy wants there is room for."""
        if self.drafter is None or not self.drafting or not expansion.choices:
            return 0
        return min(expansion.steps, self.drafter.room // len(expansion.choices))

    def choose_trunk(self, state: State) -> InFlight:
        tree, choice = self.tree, self.policy.choose_trunk(self.tree, state)
        size = len(tree)
        nodes = tuple(tree.take_all(choice.choices[: self.verifier.most_rows]))
        self.stats.drafted += len(tree) - size
        return InFlight(nodes, nodes[min(choice.branch_point, len(nodes) - 1)])

    # ---- Growing, committing, learning

    def take(self, expansion: Expansion) -> Nodes:
        """Where the draft is to run; a candidate becomes a node."""
        assert self.drafter is not None
        size = len(self.tree)
        nodes = self.tree.take_all(expansion.choices)
        self.stats.drafted += len(self.tree) - size
        return self.drafter, self.tree, nodes

    def grow(self, nodes: Sequence[int], drafted: Drafted, flight: InFlight | None) -> None:
        """Make nodes of as many of the draft's candidates as the policy wants."""
        tree, size = self.tree, len(self.tree)
        for node in tree.descend(nodes, drafted.proposals):
            if width := self.policy.width(tree, node, flight):
                tree.branch(node, width)
        for step in drafted.steps:
            self.stats.add_draft(step)
        self.stats.drafted += len(tree) - size

    def commit(self, flight: InFlight, verdict: Verdict) -> list[int]:
        """Both caches take the accepted path; the tree starts again at the target's next token, with what was drafted
        below it. Returns the tokens."""
        tree = self.tree
        path = [0, *(flight.nodes[place] for place in verdict.path)]
        committed = [*tree.tokens(path[1:]), verdict.next_token]
        node = tree.child(path[-1], verdict.next_token)
        self.stats.count(tree, len(flight.nodes) - 1, path, node)
        survivors: dict[int, int] = {}
        if node is None:
            rerooted = Tree(verdict.next_token, tree.position + len(committed))
        else:
            rerooted, survivors = tree.reroot(node)
        self.verifier.commit(verdict.path)
        if self.drafter is not None:
            self.drafter.commit(path, survivors, committed)
            self._lessons.append((tree, path, verdict))
        self.tree, self.forecast = rerooted, verdict.forecast
        self.remaining -= len(committed)
        self.stats.new_tokens += len(committed)
        return committed

    def learn(self) -> None:
        """Update the calibrator from the latest verdicts. Called just before the next draft step, so that it runs while
        the target is busy."""
        if self.drafter is not None:
            for tree, path, verdict in self._lessons:
                self.drafter.learn(tree, path, verdict.next_token, verdict.forecast)
        self._lessons.clear()

    def measure(self, state: State, trunk: Trunk, verdict: Verdict, seconds: float, end: float) -> None:
        """Keep what a round brought that ended at `end`. seconds: this text's share of it."""
        self.stats.add_target(verdict.step)
        tokens = len(verdict.path) + 1
        round = self.stats.end_round(end, tokens)
        self.stats.plain_token_seconds = self.costs.plain
        if not self.drafting:
            return
        gain = tokens * self.costs.plain - seconds if self.has_drafted(trunk) and state.costs.target.known else 0.0
        self.saved += gain
        self.backoff.record(bool(round.draft), gain / max(self.costs.plain, 1e-9), state.retry)
        last = verdict.path[-1] if verdict.path else 0
        self.costs.record_verdict(len(verdict.path), rejected=last in trunk.parents)
        self.stats.overlapped_rounds += state.overlapped
        self.stats.overlap = self.stats.overlapped_rounds > 0

    def has_drafted(self, trunk: Trunk) -> bool:
        """Whether the newest round was not a plain one for this text."""
        return bool(self.stats.log[-1].draft) or len(trunk) > 1
