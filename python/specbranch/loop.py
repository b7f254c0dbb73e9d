"""The decoding loop of one text: draft, choose a trunk, verify it while the draft goes on, commit.

Every method is this loop with another policy. The loop alone grows the tree, and only `_commit` changes what the two
models hold.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from specbranch.core.excerpt import ALL
from specbranch.core.messages import Forecast, Trunk, Verdict
from specbranch.core.stats import Stats
from specbranch.core.tree import Tree
from specbranch.policies.backoff import Backoff
from specbranch.policies.costs import Costs
from specbranch.policies.policy import Expansion, InFlight, Policy, State
from specbranch.policies.reading import AtOnce, Reading, Unread
from specbranch.stages import Drafter, Pending, ShouldContinue, Verifier, Workers

READ_ALL = AtOnce(ALL)


class DecodingLoop:
    """Decodes one text.

    overlap: True, False, or None to take what the costs prefer. reading: when the draft reads, and what. drafting:
    whether it has read the text; before that, decoding is autoregressive. saved: seconds, by drafting in this text so
    far; negative where it has lost some.
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
        self.drafting = False
        self.saved = 0.0
        self.clock = workers.clock
        self.backoff = Backoff()
        self.forecast: Forecast | None = None
        self.stats = Stats(method=policy.name)
        self._lessons: list[tuple[Tree, list[int], Verdict]] = []

    def rounds(self, prompt: Sequence[int], max_new_tokens: int) -> Generator[list[int], None, None]:
        """Yield the tokens that each round commits, at most `max_new_tokens` in all, for as long as it is asked."""
        tree = self._prefill(prompt)
        remaining = max_new_tokens
        try:
            while remaining > 0:
                self._read(tree, len(prompt), remaining)
                state = self._state(min(remaining, self.verifier.most_tokens(tree.position)))
                self.stats.begin_round(self.clock(), state.overlapped)
                self._draft_before(tree, state)
                flight = self._choose_trunk(tree, state)
                trunk = Trunk.of(tree, flight.nodes)
                if state.overlapped:
                    pending = self.workers.submit(self.verifier, trunk)
                    self._draft_during(tree, flight, pending, state)
                    verdict = pending.result()
                else:
                    verdict = self.verifier.verify(trunk).result()
                committed, tree = self._commit(tree, flight, verdict)
                self._measure(state, trunk, verdict, len(committed))
                remaining -= len(committed)
                yield committed
        finally:
            self.workers.wait()
            self._learn()

    def _prefill(self, prompt: Sequence[int]) -> Tree:
        """The target reads the prompt but its last token, which becomes the root."""
        begin = self.clock()
        read = self.verifier.prefill(prompt)
        if self.drafter is not None:
            self.drafter.begin(prompt)
        self.workers.wait()
        self.stats.prompt_tokens, self.stats.reused_tokens = len(prompt), len(prompt) - 1 - read
        self.stats.prefill_seconds = self.clock() - begin
        self.costs.target_read.record(read, self.stats.prefill_seconds)
        return Tree(prompt[-1], len(prompt) - 1)

    def _read(self, tree: Tree, prompt_tokens: int, remaining: int) -> None:
        """The draft reads the text, or the ends of the prompt and what follows, as soon as that is expected to pay."""
        if self.drafter is None or self.drafting:
            return
        end = tree.position + 1 + remaining
        gaps = {excerpt: len(self.drafter.gap(excerpt, end)) for excerpt in self.reading.excerpts}
        tokens = {excerpt: self.drafter.unread(excerpt, end) for excerpt in gaps}
        excerpt = self.reading.choose(Unread(self.costs, tokens, remaining))
        if excerpt is None:
            return
        begin = self.clock()
        self.drafter.read(excerpt, end)
        self.workers.wait()
        seconds = self.clock() - begin
        self.drafting = True
        self.costs.record_reading(tokens[excerpt], seconds)
        self.stats.add_reading(prompt_tokens - gaps[excerpt], seconds)

    def _state(self, remaining: int) -> State:
        overlapped = False
        if self.policy.overlaps and self.drafting:
            saved = self.saved if self.policy.thrifty else math.inf
            overlapped = self.costs.choose_overlap(saved) if self.overlap is None else self.overlap
        mode = self.costs.mode(overlapped)
        losing = -self.saved > self.costs.bearable_loss(self.stats.new_tokens)
        burst = 1 if self.drafter is None else min(self.drafter.burst, mode.burst())
        retry = self.backoff.over(mode.step_price)
        return State(overlapped, mode, self.costs.acceptance, remaining, retry, burst, self.forecast, losing)

    # ---- Draft, choose

    def _draft_before(self, tree: Tree, state: State) -> None:
        while steps := self._steps(expansion := self.policy.draft_before(tree, state)):
            self._expand(tree, expansion, steps, None, state, lambda under_way: True)

    def _choose_trunk(self, tree: Tree, state: State) -> InFlight:
        choice = self.policy.choose_trunk(tree, state)
        size = len(tree)
        nodes = tuple(tree.take_all(choice.choices[: self.verifier.most_rows]))
        self.stats.drafted += len(tree) - size
        return InFlight(nodes, nodes[min(choice.branch_point, len(nodes) - 1)])

    def _draft_during(self, tree: Tree, flight: InFlight, pending: Pending, state: State) -> None:
        """Grow branches until the target is done, or until it would have to wait for the next step."""
        begin, cost = self.clock(), self.costs.overlapped

        def should_continue(under_way: int) -> bool:
            """Whether one more step would end with the target, or at most half a step later."""
            if pending.done():
                return False
            if not cost.target.known or self.stats.overlapped_rounds < 2:
                return True
            left = cost.target.of(len(flight.nodes)) - (self.clock() - begin)
            return left >= (under_way + 0.5) * cost.draft.of(len(expansion.choices))

        with self.workers.draft_threads():
            while not pending.done():
                expansion = self.policy.draft_during(tree, flight, state)
                steps = self._steps(expansion)
                if not steps or not should_continue(0):
                    break
                self._expand(tree, expansion, steps, flight, state, should_continue)

    def _steps(self, expansion: Expansion) -> int:
        """How many of the steps that the policy wants there is room for."""
        if self.drafter is None or not self.drafting or not expansion.choices:
            return 0
        return min(expansion.steps, self.drafter.room // len(expansion.choices))

    def _expand(
        self,
        tree: Tree,
        expansion: Expansion,
        steps: int,
        flight: InFlight | None,
        state: State,
        should_continue: ShouldContinue,
    ) -> None:
        """Run the draft where the policy wants, and make nodes of as many of its candidates as it wants."""
        assert self.drafter is not None
        self._learn()
        begin, size = self.clock(), len(tree)
        nodes = tree.take_all(expansion.choices)
        drafted = self.drafter.propose(tree, nodes, steps, should_continue)
        for node in tree.descend(nodes, drafted.proposals):
            if width := self.policy.width(tree, node, flight):
                tree.branch(node, width)
        each = (self.clock() - begin) / len(drafted.steps)  # the host's part too: a row must be worth that as well
        for step in drafted.steps:
            self.costs.mode(state.overlapped).draft.record(step.rows, each)
            self.stats.add_draft(step)
        self.stats.drafted += len(tree) - size

    # ---- Commit, learn

    def _commit(self, tree: Tree, flight: InFlight, verdict: Verdict) -> tuple[list[int], Tree]:
        """Both caches take the accepted path; the tree starts again at the target's next token, with what was drafted
        below it."""
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
        self.forecast = verdict.forecast
        self.stats.new_tokens += len(committed)
        return committed, rerooted

    def _learn(self) -> None:
        """Update the calibrator from the latest verdicts. Called just before the next draft step, so that it runs while
        the target is busy."""
        if self.drafter is not None:
            for tree, path, verdict in self._lessons:
                self.drafter.learn(tree, path, verdict.next_token, verdict.forecast)
        self._lessons.clear()

    def _measure(self, state: State, trunk: Trunk, verdict: Verdict, tokens: int) -> None:
        """Keep what the round cost and gave, for the rounds to come."""
        mode = self.costs.mode(state.overlapped)
        mode.target.record(verdict.step.rows, verdict.step.seconds)
        self.stats.add_target(verdict.step)
        round = self.stats.end_round(self.clock(), tokens)
        self.stats.plain_token_seconds = self.costs.plain
        if not self.drafting:
            self.costs.idle += round.seconds
            return
        drafted = bool(round.draft) or len(trunk) > 1
        gain = tokens * self.costs.plain - round.seconds if drafted and mode.target.known else 0.0
        self.saved += gain
        self.backoff.record(bool(round.draft), gain / max(self.costs.plain, 1e-9), state.retry)
        self.costs.record_drafted(round.seconds, tokens)
        mode.record_round(round.seconds, tokens)
        last = verdict.path[-1] if verdict.path else 0
        self.costs.record_verdict(len(verdict.path), rejected=last in trunk.parents)
        self.stats.overlapped_rounds += state.overlapped
        self.stats.overlap = self.stats.overlapped_rounds > 0
