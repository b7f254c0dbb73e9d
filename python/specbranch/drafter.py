"""The drafter: runs the draft model over tree nodes and notes its candidates there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from specbranch.calibration import Calibrator
from specbranch.hrad import Outlook
from specbranch.model import CachedModel
from specbranch.sampling import Sampling
from specbranch.tree import Proposals, Signals, Tree
from specbranch_ext import draft_sample


class Drafter:
    """Proposes tokens with the draft model and with the noise that the target will sample with."""

    def __init__(
        self,
        model: CachedModel,
        sampling: Sampling,
        candidates: int,
        vocabulary: int,
        calibrator: Calibrator | None = None,
    ) -> None:
        """candidates: how many per node. vocabulary: ids from here on are padding and are never proposed.
        calibrator: corrects the draft's confidence; None takes its word."""
        self.model = model
        self.sampling = sampling
        self.vocabulary = min(vocabulary, model.vocabulary)
        self.candidates = min(max(candidates, 2), self.vocabulary)
        self.calibrator = calibrator
        self.outlook: Outlook | None = None

    def propose(self, tree: Tree, nodes: Sequence[int], text: Sequence[int]) -> Tree:
        """The tree with candidates noted at each of `nodes`, after one forward over them.

        text: the committed tokens, for those that the draft has not seen yet.
        """
        backlog = text[self.model.cache.length : tree.position] if 0 in nodes else ()
        logits = self.model.score(tree, nodes, backlog)
        positions = logits.new_tensor([tree.position + tree.nodes[i].depth + 1 for i in nodes], dtype=torch.int64)
        sample = draft_sample(logits[:, : self.vocabulary], positions, self.candidates, **self.sampling.op_arguments)
        rows = zip(nodes, *(part.tolist() for part in sample), strict=True)
        for node, tokens, scores, confidence, entropy in rows:
            count = sum(token >= 0 for token in tokens)
            if count == 0:  # on a device, where a kernel cannot raise
                raise ValueError("draft_logits: a row has NaN or +inf, or masks every token")
            word = confidence[:count] if self.sampling.temperature == 0 else agreement(scores[:count])
            margin = scores[0] - scores[1] if count > 1 else math.inf
            signals = Signals(word[0], entropy, margin, depth := tree.nodes[node].depth, stands(self.outlook, depth))
            tree = tree.propose(node, note(tokens[:count], word, signals, self.calibrator))
        return tree

    def prefill(self, tokens: Sequence[int]) -> None:
        self.model.prefill(tokens)

    @property
    def room(self) -> int:
        """Nodes that the draft may still run over before the next commit."""
        return self.model.cache.room

    def commit(self, path: Sequence[int], survivors: Mapping[int, int]) -> None:
        """Keep the accepted path and what lives on, old index to new index; drop the rest."""
        self.model.cache.commit(path, survivors)

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


def note(tokens: Sequence[int], word: Sequence[float], signals: Signals, calibrator: Calibrator | None) -> Proposals:
    """Candidates with the chance of each: the draft's own word, or what the calibrator makes of it."""
    chances = tuple(word) if calibrator is None else calibrator.chances(signals, tuple(word))
    return Proposals(tuple(tokens), chances, signals)


def agreement(scores: Sequence[float]) -> list[float]:
    """Estimated chance that the target, under the same noise, picks each candidate: a softmax of perturbed scores.

    The noise is known, so a candidate far ahead of the next is likely the target's too, however flat the draft's
    distribution is. At temperature 0 the same formula is the draft's probability.
    """
    weights = [math.exp(score - scores[0]) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
