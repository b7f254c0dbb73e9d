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
    when it began, or was read on. drafting: whether the draft has read the text; before that, decoding is
    autoregressive. saved: seconds, by drafting in this text so far; negative where it has lost some.
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
        self.drafting = False
        self.saved = 0.0
        self.backoff = Backoff()
        self.forecast: Forecast | None = None
        self.stats = Stats(method=policy.name)
        self.read_at = 0.0
        self._unread = 0  # of the prompt, by the target
        self._excerpt: Excerpt | None = None  # that the draft reads
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

    def read(self, most: float = math.inf) -> int:
        """Read at least so many more tokens of what is to be read, if there are: the target its prompt, then the draft.
        Returns how many."""
        count = self._read_prompt(most) if self._unread else 0
        if count < most:
            count += self._read_draft(most - count)
        if count:
            self.read_at = self.workers.clock()
        return count

    def _read_prompt(self, most: float) -> int:
        begin = self.workers.clock()
        count = self.verifier.read(most)
        self.workers.wait()
        seconds = self.workers.clock() - begin
        self._unread -= count
        self.stats.prefill_seconds += seconds
        self.costs.record_prompt(count, seconds)
        return count

    def _read_draft(self, most: float) -> int:
        """Of the text, or of the ends of the prompt and what follows, as soon as that is expected to pay."""
        if self.drafter is None or self.drafting:
            return 0
        end = self.tree.position + 1 + self.remaining
        if self._excerpt is None:
            tokens = {excerpt: self.drafter.unread(excerpt, end) for excerpt in self.reading.excerpts}
            self._excerpt = self.reading.choose(Unread(self.costs, tokens, self.remaining))
            if self._excerpt is None:
                return 0
        begin = self.workers.clock()
        count = self.drafter.read(self._excerpt, end, most)
        self.workers.wait()
        seconds = self.workers.clock() - begin
        self.costs.record_reading(count, seconds)
        self.stats.add_reading(self._prompt_tokens - len(self.drafter.gap(self._excerpt, end)), seconds)
        self.drafting = self.drafter.unread(self._excerpt, end) == 0
        if self.drafting:
            self.costs.end_waiting()
        return count

    # ---- Decisions

    @property
    def may_overlap(self) -> bool:
        return self.policy.overlaps and self.drafting

    def choose_overlap(self) -> bool:
        """Whether the draft is to go on beside the target, in the round to come."""
        saved = self.saved if self.policy.thrifty else math.inf
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

    def measure(self, state: State, trunk: Trunk, verdict: Verdict, texts: int, end: float) -> None:
        """Keep what a round brought that ended at `end`. texts: that went through it together."""
        self.stats.add_target(verdict.step)
        tokens = len(verdict.path) + 1
        round = self.stats.end_round(end, tokens)
        self.stats.plain_token_seconds = self.costs.plain
        seconds = round.seconds / texts  # this one's share
        if not self.drafting:
            self.costs.idle += seconds
            return
        drafted = bool(round.draft) or len(trunk) > 1
        gain = tokens * self.costs.plain - seconds if drafted and state.costs.target.known else 0.0
        self.saved += gain
        self.backoff.record(bool(round.draft), gain / max(self.costs.plain, 1e-9), state.retry)
        self.costs.record_drafted(seconds, tokens)
        last = verdict.path[-1] if verdict.path else 0
        self.costs.record_verdict(len(verdict.path), rejected=last in trunk.parents)
        self.stats.overlapped_rounds += state.overlapped
        self.stats.overlap = self.stats.overlapped_rounds > 0
