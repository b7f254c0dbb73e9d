"""The drafter: runs the draft model over tree nodes and notes its candidates there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from specbranch.core.messages import Step
from specbranch.core.sampling import Sampling
from specbranch.core.tree import Proposals, Signals, Tree
from specbranch.policies.calibration import Calibrator
from specbranch.runtime.cache import MAX_BACKLOG
from specbranch.runtime.hrad.predictor import Outlook
from specbranch.runtime.runner import Going, Guesses, Runner


class Drafted(NamedTuple):
    """What a run of the draft gave: the tree with candidates noted at `nodes`, and the steps that it took."""

    tree: Tree
    nodes: list[int]
    steps: list[Step]


def always(under_way: int = 0) -> bool:
    return True


class Drafter:
    """Proposes tokens with the draft model and with the noise that the target will sample with."""

    def __init__(
        self,
        runner: Runner,
        sampling: Sampling,
        candidates: int,
        vocabulary: int,
        calibrator: Calibrator | None = None,
    ) -> None:
        """candidates: how many per node. vocabulary: ids from here on are padding and are never proposed.
        calibrator: corrects the draft's confidence; None takes its word."""
        self.runner = runner
        self.sampling = sampling
        self.vocabulary = min(vocabulary, runner.model.vocabulary)
        self.candidates = min(max(candidates, 2), self.vocabulary)
        self.calibrator = calibrator
        self.outlook: Outlook | None = None

    def propose(
        self,
        tree: Tree,
        nodes: Sequence[int],
        text: Sequence[int],
        steps: int = 1,
        going: Going = always,
    ) -> Drafted:
        """Run the draft over `nodes`, and then over the first candidates there, until there are `steps` steps or
        `going`, asked before each further one, says no. Those candidates become nodes.

        text: the committed tokens, for those that the draft has not seen yet.
        """
        cache = self.runner.model.cache
        backlog = text[cache.length : tree.position] if 0 in nodes else ()
        if len(backlog) > MAX_BACKLOG:  # after rounds without the draft
            self.runner.prefill(backlog[:-MAX_BACKLOG])
            backlog = backlog[-MAX_BACKLOG:]
        batch = self.runner.model.place(tree, nodes, backlog)
        guesses = self.runner.draft(batch, self.candidates, self.vocabulary, self.sampling, steps, going)
        grown, everywhere = tree.descend(nodes, self._proposals(guesses, [tree.nodes[node].depth for node in nodes]))
        cache.nodes += everywhere[len(nodes) :]
        return Drafted(grown, everywhere, [each.step for each in guesses])

    def _proposals(self, guesses: Sequence[Guesses], depths: Sequence[int]) -> list[list[Proposals]]:
        """[steps][leaves]."""
        said = [
            self._said(each, place, depth + number)
            for number, each in enumerate(guesses)
            for place, depth in enumerate(depths)
        ]
        found = note(said, self.calibrator)
        return [found[i : i + len(depths)] for i in range(0, len(found), len(depths))]

    def _said(self, guesses: Guesses, place: int, depth: int) -> Said:
        tokens, scores = guesses.tokens[place], guesses.scores[place]
        count = len(tokens) if tokens[-1] >= 0 else sum(token >= 0 for token in tokens)
        if count == 0:  # on a device, where a kernel cannot raise
            raise ValueError("draft_logits: a row has NaN or +inf, or masks every token")
        word = guesses.confidence[place] if self.sampling.temperature == 0 else agreement(scores[:count])
        margin = scores[0] - scores[1] if count > 1 else math.inf
        signals = Signals(word[0], guesses.entropy[place], margin, depth, stands(self.outlook, depth))
        return tokens[:count], word[:count], signals

    @property
    def burst(self) -> int:
        """Draft steps that are best asked for at once."""
        return self.runner.burst

    def prefill(self, tokens: Sequence[int]) -> None:
        self.runner.prefill(tokens)

    @property
    def room(self) -> int:
        """Nodes that the draft may still run over before the next commit."""
        return self.runner.model.cache.tree_room

    def commit(self, path: Sequence[int], survivors: Mapping[int, int]) -> None:
        """Keep the accepted path and what lives on, old index to new index; drop the rest."""
        self.runner.commit(path, survivors)

    def learn(self, tree: Tree, path: Sequence[int], next_token: int, outlook: Outlook | None) -> None:
        """Take the verdict's labels, and a predictor's outlook on the round to come."""
        learn(self.calibrator, tree, path, next_token)
        self.outlook = outlook


def learn(calibrator: Calibrator | None, tree: Tree, path: Sequence[int], next_token: int) -> None:
    """Labels for the calibrator: at every node of the accepted path, the token that the target went on with."""
    if calibrator is None:
        return
    for node, token in zip(path, [*tree.tokens(path[1:]), next_token], strict=True):
        proposals = tree.nodes[node].proposals
        if proposals is not None and proposals.signals is not None:
            calibrator.learn(proposals.signals, proposals.tokens[0] == token, token in proposals.tokens)


def stands(outlook: Outlook | None, depth: int) -> float:
    return 0.0 if outlook is None else outlook.stands(depth)


Said = tuple[Sequence[int], Sequence[float], Signals]
"""What the draft said at a node: candidates, its own word on each, and the signals."""


def note(said: Sequence[Said], calibrator: Calibrator | None) -> list[Proposals]:
    """Candidates with the chance of each: the draft's own word, or what the calibrator makes of it."""
    if calibrator is None:
        return [Proposals(tuple(tokens), tuple(word), signals) for tokens, word, signals in said]
    chances = calibrator.chances([signals for _, _, signals in said], [word for _, word, _ in said])
    return [Proposals(tuple(said[i][0]), chances[i], said[i][2]) for i in range(len(said))]


def agreement(scores: Sequence[float]) -> list[float]:
    """Estimated chance that the target, under the same noise, picks each candidate: a softmax of perturbed scores.

    The noise is known, so a candidate far ahead of the next is likely the target's too, however flat the draft's
    distribution is. At temperature 0 the same formula is the draft's probability.
    """
    weights = [math.exp(score - scores[0]) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
