"""A draft model as the drafter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from specbranch.constrained import Constrained
from specbranch.core.excerpt import NO_GAP, Excerpt
from specbranch.core.messages import Drafted, Forecast
from specbranch.core.sampling import Sampling
from specbranch.core.tree import ProposalRows, Tree
from specbranch.policies.calibration import Calibrator
from specbranch.runtime.cache import MAX_BACKLOG
from specbranch.runtime.model import whole_chunks
from specbranch.runtime.rules import DraftRules
from specbranch.runtime.runner import AllowedBehind, Guessed, Leaves, Runner, Samples
from specbranch.stages import ShouldContinue


class ModelDrafter:
    """Proposes tokens with the draft model and with the noise that the target will sample with."""

    def __init__(
        self,
        runner: Runner,
        sampling: Sampling,
        candidates: int,
        vocabulary: int,
        calibrator: Calibrator | None = None,
        rules: DraftRules | None = None,
        constraint: Constrained | None = None,
    ) -> None:
        """candidates: how many per node. vocabulary: ids from here on are padding and are never proposed.
        calibrator: corrects the draft's confidence; None takes it as it is. rules: that logits go through first.
        constraint: what the text may be; nothing else is proposed."""
        self.runner = runner
        self.sampling = sampling
        self.vocabulary = min(vocabulary, runner.model.vocabulary)
        self.candidates = min(max(candidates, 2), self.vocabulary)
        self.calibrator = calibrator
        self.rules = rules
        self.constraint = constraint
        self.forecast: Forecast | None = None
        self._text: list[int] = []  # committed, the root included: what the cache lacks of it is caught up with
        self._prompt_tokens, self._known, self._has_begun = 0, 0, False

    @property
    def burst(self) -> int:
        """Draft steps that are best asked for at once."""
        return self.runner.burst

    @property
    def room(self) -> int:
        """Nodes that the draft may still run over before the next commit."""
        return self.runner.model.cache.tree_room

    def begin(self, prompt: Sequence[int]) -> None:
        """Start a text; see stages.Drafter."""
        self._text, self._prompt_tokens, self._has_begun = list(prompt), len(prompt), False
        self.runner.model.cache.restart(0)
        self._known = self.runner.model.known(self._text[:-1])

    def gap(self, excerpt: Excerpt, tokens: int) -> range:
        """What it would leave out; see stages.Drafter."""
        gap = excerpt.gap(self._prompt_tokens)
        return gap if self.runner.model.may_skip(gap, tokens) else NO_GAP

    def unread(self, excerpt: Excerpt, tokens: int) -> int:
        """See stages.Drafter."""
        gap = self.gap(excerpt, tokens)
        if self._has_begun:
            return len(self._text) - 1 - len(gap) - self.runner.model.cache.length
        return len(self._text) - 1 - len(gap) - (min(self._known, gap.start) if gap else self._known)

    def read(self, excerpt: Excerpt, tokens: int, most: float = math.inf) -> int:
        """Read the prompt or its ends, and what was committed since; see stages.Drafter."""
        model, text, gap = self.runner.model, self._text, self.gap(excerpt, tokens)
        if not self._has_begun:
            self.runner.reset(tokens - len(gap), text[: gap.start] if gap else text[:-1])
            self._has_begun = True
            model.begin(text[: self._prompt_tokens], gap)
            if model.must_reread(len(text) - 1):  # before there are rows: it only says how angles are chosen
                model.reread(text, len(text) - 1)
        count = 0
        while count < most:
            start = model.position
            part = text[start : gap.start if start < gap.start else -1] if gap else text[start:-1]
            if not part:
                break
            chunks = part[: whole_chunks(most - count, len(part))]
            self.runner.prefill(chunks)
            count += len(chunks)
        return count

    def keep(self) -> None:
        """The text is over: its rows may serve a text that begins alike. What was kept before stays if nothing was
        read."""
        model = self.runner.model
        if self._has_begun:
            model.keep(self._text[: model.position], self._prompt_tokens)

    def propose(
        self,
        tree: Tree,
        nodes: Sequence[int],
        steps: int = 1,
        should_continue: ShouldContinue = lambda under_way: True,
    ) -> Drafted:
        """Run over `nodes`, then over the first candidates of each step; see stages.Drafter."""
        leaves = self.place(tree, nodes)
        (samples,) = self.runner.draft([leaves], self.candidates, self.vocabulary, steps, should_continue)
        return self.drafted(tree, nodes, samples)

    def place(self, tree: Tree, nodes: Sequence[int]) -> Leaves:
        """The nodes' part of a forward, whose rows they take."""
        model = self.runner.model
        if model.must_reread(tree.position):
            with self.runner.device.running():
                model.reread(self._text, tree.position)
        backlog = self._text[model.position : tree.position] if 0 in nodes else []
        if len(backlog) > MAX_BACKLOG:  # after rounds without the draft
            self.runner.prefill(backlog[:-MAX_BACKLOG])
            backlog = backlog[-MAX_BACKLOG:]
        depth_of, parent_of = tree.depth, tree.parent
        batch = model.place(
            nodes,
            [parent_of[node] for node in nodes],
            tree.tokens(nodes),
            [tree.position + depth_of[node] for node in nodes],
            backlog,
        )
        return Leaves(model, batch, self.sampling, self._rules(tree, nodes), self._allowed(tree, nodes))

    def drafted(self, tree: Tree, nodes: Sequence[int], samples: Sequence[Samples]) -> Drafted:
        """What the samples say, below `nodes` step by step; the nodes that Tree.descend makes of them have rows."""
        for step in range(1, len(samples)):
            first = len(tree) + (step - 1) * len(nodes)
            above = nodes if step == 1 else range(first - len(nodes), first)
            self.runner.model.cache.add(range(first, first + len(nodes)), above)
        depth_of, proposals = tree.depth, ProposalRows()
        depths = [depth_of[node] for node in nodes]
        odds = (0.0, 0.0) if self.forecast is None else (self.forecast.log_odds(0), self.forecast.log_odds(1))
        for step, each in enumerate(samples):
            each = each.best(self.candidates)
            confidence = each.confidence if self.sampling.temperature == 0 else None
            below = [depth + step for depth in depths]
            proposals.add(each.tokens, each.scores, confidence, each.entropy, below, odds)
        tree.relate(proposals, nodes)
        if self.calibrator is not None:
            proposals = self.calibrator.correct(proposals)
        return Drafted(proposals, [each.step for each in samples])

    def commit(self, path: Sequence[int], survivors: Mapping[int, int], tokens: Sequence[int]) -> None:
        """Keep the accepted path and what lives on; see stages.Drafter."""
        self.runner.commit(path, survivors)
        self._text += tokens

    def learn(self, tree: Tree, path: Sequence[int], next_token: int, forecast: Forecast | None) -> None:
        """Take the verdict's labels, and a predictor's forecast for the round to come."""
        if self.calibrator is not None:
            self.calibrator.observe(tree, path, next_token)
        self.forecast = forecast

    def _rules(self, tree: Tree, nodes: Sequence[int]) -> Guessed | None:
        """What logits below some nodes become, and below what is drafted there."""
        if self.rules is None:
            return None
        rules, text, paths = self.rules, self._text, _paths(tree, nodes)

        def guessed(logits: Tensor, behind: Sequence[Sequence[int]]) -> Tensor:
            return rules(logits, text, [[*path, *tail] for path, tail in zip(paths, behind, strict=True)])

        return guessed

    def _allowed(self, tree: Tree, nodes: Sequence[int]) -> AllowedBehind | None:
        """The masks at some nodes, and behind what is drafted there."""
        if self.constraint is None:
            return None
        constraint, paths = self.constraint, _paths(tree, nodes)

        def allowed(behind: Sequence[Sequence[int]]) -> list[bytes]:
            return [constraint.allowed([*path, *tail]) for path, tail in zip(paths, behind, strict=True)]

        return allowed


def _paths(tree: Tree, nodes: Sequence[int]) -> list[list[int]]:
    """The tokens from the root to each node, without the root's."""
    return [tree.tokens(tree.path(node)[1:]) for node in nodes]
