"""One text on its way: its tree, its models, and what it has learned of them. The rounds are in loop.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specbranch.constrained import Constrained
from specbranch.core.excerpt import ALL, Excerpt
from specbranch.core.messages import Drafted, Forecast, Trunk, Verdict
from specbranch.core.stats import Stats
from specbranch.core.tree import Choice, Tree
from specbranch.policies.backoff import Backoff
from specbranch.policies.costs import Costs
from specbranch.policies.policy import Expansion, InFlight, Policy, State
from specbranch.policies.reading import AtOnce, Reading, Unread
from specbranch.stages import Drafter, Nodes, Retriever, Verifier, Workers

READ_ALL = AtOnce(ALL)
LEAST_REACH = 0.02  # of a retrieved token: no row is as cheap
LONGEST_RUN = 64  # of retrieved tokens in a trunk: half as many,
COPIED = 16  # unless so many were right one after the other


class Decoding:
    """Decodes one text, in rounds; only `commit` changes what the two models hold.

    overlap: True, False, or None to take what the costs prefer. reading: when the draft reads, and what. costs: of the
    rounds to come. tree: its root is the last committed token. remaining: tokens that may still be committed. read_at:
    when it began, or was read on. excerpt: what the draft is to read, once that is decided. drafting: whether it has;
    before that, nothing is drafted but what a retriever finds. saved: seconds, by drafting in this text so far;
    negative where it has lost some. constraint: what the text may be; tokens that it forces are drafted where a method
    takes such that no draft proposed.
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
        retriever: Retriever | None = None,
        constraint: Constrained | None = None,
        watched: bool = False,
    ) -> None:
        """watched: somebody wants to see every token that the target chose."""
        self.constraint, self._watched = constraint, watched
        self._forcing = constraint if constraint is not None and constraint.forces and policy.may_retrieve else None
        self.verifier, self.drafter, self.policy, self.retriever = verifier, drafter, policy, retriever
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
        self._judged = 0, False  # tokens accepted that the draft had said, and whether it had said the next one
        self._lessons: list[tuple[Tree, list[int], Verdict]] = []
        self._right_in_a_row = 0  # retrieved tokens that were right since one was wrong

    # ---- Prompts

    def begin(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """The last token of the prompt is the root. Nothing is read yet."""
        self._unread = self.verifier.begin(prompt)
        if self.drafter is not None:
            self.drafter.begin(prompt)
        if self.retriever is not None:
            self.retriever.begin(prompt)
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
        burst = 1
        if self.drafter is not None and self.constraint is None:  # which the host is asked about, step by step
            burst = min(self.drafter.burst, mode.burst())
        retry = self.backoff.over(mode.step_price())
        mine = overlapped and self.may_overlap
        return State(mine, mode, self.costs.acceptance, remaining, retry, burst, self.forecast, losing)

    def draft_before(self, state: State) -> Expansion:
        """What the draft is to run over next, before there is a trunk."""
        return self._readable(self.policy.draft_before(self.tree, state))

    def draft_during(self, flight: InFlight, state: State) -> Expansion:
        """The same while the target verifies."""
        return self._readable(self.policy.draft_during(self.tree, flight, state))

    def _readable(self, wanted: Expansion) -> Expansion:
        """What the policy wants, behind what a draft must run over before that: nodes above that it did not
        propose."""
        if (self.retriever is None and self._forcing is None) or not wanted.choices:
            return wanted
        tree, choices = self.tree, self.tree.with_unread(wanted.choices)
        # The next step of a burst makes nodes of first candidates, which a retrieved one may be already.
        alone = not any(choice.rank < 0 and tree.children[choice.node] for choice in choices)
        return Expansion(choices, wanted.steps if alone else 1)

    def steps(self, expansion: Expansion) -> int:
        """How many of the steps that the policy wants there is room for."""
        if self.drafter is None or not self.drafting or not expansion.choices:
            return 0
        return min(expansion.steps, self.drafter.room // len(expansion.choices))

    def choose_trunk(self, state: State) -> InFlight:
        choice = self.policy.choose_trunk(self.tree, state)
        nodes = tuple(self._use(choice.choices[: self.verifier.most_rows]))
        return InFlight(nodes, nodes[min(choice.branch_point, len(nodes) - 1)])

    # ---- Growing, committing, learning

    def take(self, expansion: Expansion) -> Nodes:
        """Where the draft is to run; a candidate becomes a node."""
        assert self.drafter is not None
        return self.drafter, self.tree, self._use(expansion.choices)

    def _use(self, choices: Sequence[Choice]) -> list[int]:
        """The nodes of choices that a model is to run over: from now on they have cost something."""
        size = len(self.tree)
        nodes = self.tree.take_all(choices)
        self.stats.drafted += len(self.tree) - size + self.tree.use(nodes)
        return nodes

    def extend(self) -> None:
        """Let the tree go on where that costs no forward: with what must follow, with what followed elsewhere, and
        where little may follow with all of it."""
        self.force([0])
        self.retrieve()
        if not self.drafting:
            self._offer_few()

    def force(self, nodes: Sequence[int]) -> None:
        """Let what must follow some nodes stand in the tree."""
        if self._forcing is None:
            return
        tree = self.tree
        for node in nodes:
            room = self.remaining - 1 - tree.depth[node]  # no deeper token can be committed
            if room > 0 and (run := self._forcing.forced(self._behind(node))):
                tree.force(node, run[:room])

    def _force_candidate(self, node: int) -> None:
        """The same behind the draft's first candidate there; where nothing must follow it stays a candidate."""
        tree = self.tree
        assert self._forcing is not None
        proposals, room = tree.proposals[node], self.remaining - 2 - tree.depth[node]
        if proposals is None or room < 1 or tree.child(node, proposals.tokens[0]) is not None:
            return
        if tree.reach_of(Choice(node, 0)) < LEAST_REACH:
            return
        if self._forcing.forced([*self._behind(node), proposals.tokens[0]]):
            self.stats.drafted += 1
            self.force([tree.take(Choice(node, 0))])

    def _offer_few(self) -> None:
        """Where a handful may follow nodes of the best path, let all of them stand."""
        if self._forcing is None:
            return
        tree, node = self.tree, 0
        while tree.depth[node] < self.remaining - 1:
            self.force([node])
            if not tree.is_bound(node):
                left = 1.0 - sum(tree.chances([Choice(child) for child in tree.children[node]]))
                for token, chance in self._forcing.few(self._behind(node)):
                    reach = tree.reach[node] * chance * left
                    if reach >= LEAST_REACH and tree.child(node, token) is None:
                        self.force([tree.add(node, token, reach, free=True)])
            path = tree.best_path(node)
            if len(path) == 1:
                break
            node = path[1]

    def _behind(self, node: int) -> list[int]:
        """The tokens from the root, which is committed, to a node."""
        return self.tree.tokens(self.tree.path(node)[1:])

    def retrieve(self, flight: InFlight | None = None) -> None:
        """Let the best path go on with what followed its end elsewhere."""
        if self.retriever is None:
            return
        self.learn()
        tree, path = self.tree, self.tree.best_choices()
        trunk = 0 if flight is None else max(tree.depth[node] for node in flight.nodes)
        longest = LONGEST_RUN if self._right_in_a_row >= COPIED else LONGEST_RUN // 2
        deepest, end = min(self.remaining - 1, trunk + longest), path[-1]
        if len(path) > deepest or tree.reach_of(end) < LEAST_REACH:
            return
        drafted = tree.tokens([choice.node for choice in path[1:] if choice.rank < 0])
        if end.rank >= 0:
            proposals = tree.proposals[end.node]
            assert proposals is not None
            drafted.append(proposals.tokens[end.rank])
        found, chances = self.retriever.find(drafted, min(longest, deepest - len(path) + 1))
        if self.constraint is not None:
            least = LEAST_REACH / tree.reach_of(end)
            chances = self.constraint.possible(drafted, found.token, found.parent, chances, least)
        first = [i for i, parent in enumerate(found.parent) if parent < 0]
        if first and tree.reach_of(end) * max(chances[i] for i in first) >= LEAST_REACH:
            size = len(tree)
            node = tree.take(end)
            self.stats.drafted += len(tree) - size
            size = len(tree)
            tree.graft(node, found, chances, LEAST_REACH)
            if self._forcing is not None:
                inner = [new for new in range(size, len(tree)) if tree.children[new]]
                self.force([node, *inner, tree.best_path(node)[-1]])

    def grow(self, nodes: Sequence[int], drafted: Drafted, flight: InFlight | None) -> None:
        """Make nodes of as many of the draft's candidates as the policy wants."""
        tree, size = self.tree, len(self.tree)
        drafted_at = tree.descend(nodes, drafted.proposals)
        for node in drafted_at:
            if width := self.policy.width(tree, node, flight):
                tree.branch(node, width)
        for step in drafted.steps:
            self.stats.add_draft(step)
        self.stats.drafted += len(tree) - size
        if self._forcing is not None:
            for node in drafted_at:
                self.force([node, *tree.children[node]])
                self._force_candidate(node)
        self.retrieve(flight)

    def commit(self, flight: InFlight, verdict: Verdict) -> list[int]:
        """Both caches take the accepted path; the tree starts again at the target's next token, with what was drafted
        below it. Returns the tokens."""
        tree = self.tree
        path = [0, *(flight.nodes[place] for place in verdict.path)]
        committed = [*tree.tokens(path[1:]), verdict.next_token]
        if self.constraint is not None:
            self.constraint.accept(committed)
        node = tree.child(path[-1], verdict.next_token)
        if node is not None:
            self.stats.drafted += tree.use([node])
        self.stats.count(tree, flight.nodes, path, node)
        self._count_right(flight, path)
        read = tree.read([Choice(node) for node in path])
        chosen = sum(not tree.forced(node) for node in path[1 : read + 1])
        self._judged = chosen, read == len(path)
        survivors: dict[int, int] = {}
        if node is None:
            rerooted = Tree(verdict.next_token, tree.position + len(committed))
        else:
            rerooted, survivors = tree.reroot(node)
        self.verifier.commit(verdict.path)
        if self.drafter is not None:
            self.drafter.commit(path, survivors, committed)
        if self.retriever is not None:
            self.retriever.commit(committed)
        if self.drafter is not None or self.retriever is not None:
            self._lessons.append((tree, path, verdict))
        self.tree, self.forecast = rerooted, verdict.forecast
        committed += self._certain_end(len(committed))
        self.remaining -= len(committed)
        self.stats.new_tokens += len(committed)
        return committed

    def _certain_end(self, committed: int) -> list[int]:
        """The tokens that must follow, where the text ends with them: no forward need say so."""
        if self._forcing is None or self._watched:
            return []
        rest = self._forcing.forced([])[: self.remaining - committed]
        over = rest and (rest[-1] in self._forcing.eos or len(rest) == self.remaining - committed)
        return rest if over else []

    def ask_constraint(self, flight: InFlight) -> None:
        """Find out what may follow a trunk's nodes, while the target is on its way."""
        if self.constraint is not None:
            for node in flight.nodes:
                self.constraint.allowed(self._behind(node))

    def _count_right(self, flight: InFlight, path: Sequence[int]) -> None:
        """Of retrieved tokens. path: the nodes of the trunk that were accepted, the root first."""
        tree = self.tree
        if any(tree.retrieved(node) and tree.parent[node] == path[-1] for node in flight.nodes[1:]):
            self._right_in_a_row = 0
        else:
            self._right_in_a_row += sum(map(tree.retrieved, path[1:]))

    def learn(self) -> None:
        """Update the calibrator from the latest verdicts. Called just before the next draft step, so that it runs while
        the target is busy, or before the next look-up."""
        for tree, path, verdict in self._lessons:
            if self.drafter is not None:
                self.drafter.learn(tree, path, verdict.next_token, verdict.forecast)
            if self.retriever is not None:
                self.retriever.learn(tree, path, verdict.next_token)
        self._lessons.clear()

    def measure(self, state: State, trunk: Trunk, verdict: Verdict, tokens: int, seconds: float, end: float) -> None:
        """Keep what a round brought that ended at `end`. tokens: committed. seconds: this text's share of it."""
        self.stats.add_target(verdict.step)
        round = self.stats.end_round(end, tokens)
        self.stats.plain_token_seconds = self.costs.plain
        gain = tokens * self.costs.plain - seconds if self.has_drafted(trunk) and state.costs.target.known else 0.0
        self.saved += gain
        if not self.drafting:
            return
        self.backoff.record(bool(round.draft), gain / max(self.costs.plain, 1e-9), state.retry)
        last = verdict.path[-1] if verdict.path else 0
        accepted, judged = self._judged
        self.costs.record_verdict(accepted, rejected=judged and last in trunk.parents)
        self.stats.overlapped_rounds += state.overlapped
        self.stats.overlap = self.stats.overlapped_rounds > 0

    def has_drafted(self, trunk: Trunk) -> bool:
        """Whether the newest round was not a plain one for this text."""
        return bool(self.stats.log[-1].draft) or len(trunk) > 1


def costs_name(policy: Policy, retriever: Retriever | None, constraint: Constrained | None) -> str:
    """Of texts that have the same costs."""
    free = "" if retriever is None else " with retrieval"
    return policy.name + free + ("" if constraint is None else " under a constraint")
