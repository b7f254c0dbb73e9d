"""The decoding loop: draft, cut a trunk, verify it while the draft goes on, commit, re-root.

Every method is this loop with another policy. Only `_commit` changes what both models hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from specbranch.core.stats import Stats
from specbranch.core.tree import Tree
from specbranch.drafters.model import always
from specbranch.policies.costs import Costs
from specbranch.policies.policy import Cut, Growth, Policy, Rest, Situation
from specbranch.runtime.hrad.predictor import Outlook
from specbranch.runtime.verifier import Verdict
from specbranch.stages import Draft, Pending, Target, Workers


class Decoder:
    """Decodes one text.

    tokens: the committed text, prompt included. overlap: True, False, or None to take what the costs prefer.
    """

    def __init__(
        self,
        verifier: Target,
        drafter: Draft | None,
        policy: Policy,
        costs: Costs,
        workers: Workers,
        overlap: bool | None,
    ) -> None:
        self.verifier, self.drafter, self.policy = verifier, drafter, policy
        self.costs, self.workers, self.overlap = costs, workers, overlap
        self.clock = workers.clock
        self.tokens: list[int] = []
        self.rest = Rest()
        self.outlook: Outlook | None = None
        self._lessons: list[tuple[Tree, Verdict]] = []
        self.stats = Stats(method=policy.name)

    def rounds(self, prompt: list[int], max_new_tokens: int) -> Iterator[list[int]]:
        """Yield the tokens that each round commits, at most `max_new_tokens` in all, for as long as it is asked."""
        tree = self._prefill(prompt)
        remaining = max_new_tokens
        try:
            while remaining > 0:
                situation = self._situation(remaining)
                self.stats.begin_round(self.clock(), situation.overlapped)
                tree = self._draft_ahead(tree, situation)
                cut = self.policy.cut(tree, situation).within(self.verifier.most_rows)
                self.stats.drafted += len(cut.tree) - len(tree)
                if situation.overlapped:
                    pending = self.workers.submit(self.verifier, cut.tree, cut.trunk)
                    tree = self._draft_meanwhile(cut, pending, situation)
                    verdict = pending.result()
                else:
                    tree, verdict = cut.tree, self.verifier.verify(cut.tree, cut.trunk)
                committed, tree = self._commit(tree, cut, verdict)
                self._record(situation, cut, verdict, len(committed))
                remaining -= len(committed)
                yield committed
        finally:
            self._learn()

    def _prefill(self, prompt: list[int]) -> Tree:
        """Both models read the prompt but its last token, which becomes the root."""
        begin = self.clock()
        self.tokens = list(prompt)
        self.verifier.prefill(prompt[:-1])
        if self.drafter is not None:
            self.drafter.prefill(prompt[:-1])
        self.workers.wait()
        self.stats.prompt_tokens = len(prompt)
        self.stats.prefill_seconds = self.clock() - begin
        return Tree.rooted(prompt[-1], len(prompt) - 1)

    def _situation(self, remaining: int) -> Situation:
        overlapped = False
        if self.policy.overlaps:
            overlapped = self.costs.choose_overlap() if self.overlap is None else self.overlap
        mode = self.costs.mode(overlapped)
        burst = 1 if self.drafter is None else min(self.drafter.burst, mode.burst())
        return Situation(overlapped, mode, self.costs.acceptance, remaining, self.rest.over, burst, self.outlook)

    def _draft_ahead(self, tree: Tree, situation: Situation) -> Tree:
        while steps := self._steps(growth := self.policy.before(tree, situation)):
            tree = self._expand(tree, growth, steps, None, situation, always)
        return tree

    def _draft_meanwhile(self, cut: Cut, pending: Pending, situation: Situation) -> Tree:
        """Grow the branches until the target is done, or until it would have to wait for the next step."""
        tree, begin, cost = cut.tree, self.clock(), self.costs.overlapped
        growth = Growth(tree, [])

        def going(under_way: int) -> bool:
            """Whether one more step would end with the target, or at most half a step later."""
            if pending.done():
                return False
            if not cost.target.known or self.stats.overlapped_rounds < 2:
                return True
            left = cost.target.of(len(cut.trunk)) - (self.clock() - begin)
            return left >= (under_way + 0.5) * cost.draft.of(len(growth.nodes))

        with self.workers.draft_threads():
            while not pending.done():
                growth = self.policy.during(cut, tree, situation)
                steps = self._steps(growth)
                if not steps or not going(0):
                    break
                tree = self._expand(tree, growth, steps, cut.branch_point, situation, going)
        return tree

    def _steps(self, growth: Growth) -> int:
        """How many of the steps that the policy wants there is room for."""
        if self.drafter is None or not growth.nodes:
            return 0
        return min(growth.steps, self.drafter.room // len(growth.nodes))

    def _expand(
        self,
        tree: Tree,
        growth: Growth,
        steps: int,
        branch_point: int | None,
        situation: Situation,
        going: Callable[[int], bool],
    ) -> Tree:
        """Run the draft as the policy wants, and make children of as many of its candidates."""
        assert self.drafter is not None
        self._learn()
        begin = self.clock()
        grown, nodes, done = self.drafter.propose(growth.tree, growth.nodes, self.tokens, steps, going)
        grown = grown.branch({node: self.policy.width(grown, node, branch_point) for node in nodes})
        each = (self.clock() - begin) / len(done)  # with what the host makes of it: a row must be worth that too
        for step in done:
            self.costs.mode(situation.overlapped).draft.record(step.rows, each)
            self.stats.add_draft(step)
        self.stats.drafted += len(grown) - len(tree)
        return grown

    def _learn(self) -> None:
        """The newest verdicts teach the draft: not before it goes on, so that the target need not wait for that."""
        if self.drafter is not None:
            for tree, verdict in self._lessons:
                self.drafter.learn(tree, verdict.path, verdict.next_token, verdict.outlook)
        self._lessons.clear()

    def _commit(self, tree: Tree, cut: Cut, verdict: Verdict) -> tuple[list[int], Tree]:
        """Both caches take the accepted path; the tree is re-rooted at the target's next token."""
        node = tree.child(verdict.path[-1], verdict.next_token)
        self.stats.count(tree, cut.trunk, verdict, node)
        committed = [*tree.tokens(verdict.path[1:]), verdict.next_token]
        survivors: dict[int, int] = {}
        if node is None:  # a miss: the tree restarts
            rerooted = Tree.rooted(verdict.next_token, tree.position + len(committed))
        else:
            rerooted, survivors = tree.reroot(node)
        self.verifier.commit(verdict.path)
        if self.drafter is not None:
            self.drafter.commit(verdict.path, survivors)
            self._lessons.append((tree, verdict))
        self.tokens += committed
        self.outlook = verdict.outlook
        self.stats.new_tokens += len(committed)
        return committed, rerooted

    def _record(self, situation: Situation, cut: Cut, verdict: Verdict, tokens: int) -> None:
        """Measurements for the rounds to come."""
        self.costs.mode(situation.overlapped).target.record(verdict.step.rows, verdict.step.seconds)
        self.stats.add_target(verdict.step)
        round = self.stats.end_round(self.clock(), tokens)
        if self.drafter is None:
            return
        self.rest.record(drafted=bool(round.draft), stood=verdict.accepted > 0)
        mode = self.costs.mode(situation.overlapped)
        mode.record_round(round.seconds, tokens)
        judged = any(cut.tree.nodes[node].parent == verdict.path[-1] for node in cut.trunk)
        self.costs.record_verdict(verdict.accepted, rejected=judged)
        self.stats.overlapped_rounds += situation.overlapped
        self.stats.overlap = self.stats.overlapped_rounds > 0
