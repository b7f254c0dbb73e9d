"""The drafter: runs the draft model over tree nodes and notes its candidates there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from specbranch.model import CachedModel
from specbranch.sampling import Sampling
from specbranch.tree import Proposals, Tree
from specbranch_ext import draft_sample


class Drafter:
    """Proposes tokens with the draft model and with the noise that the target will sample with."""

    def __init__(self, model: CachedModel, sampling: Sampling, candidates: int, vocabulary: int) -> None:
        """candidates: how many per node. vocabulary: ids from here on are padding and are never proposed."""
        self.model = model
        self.sampling = sampling
        self.vocabulary = min(vocabulary, model.vocabulary)
        self.candidates = min(max(candidates, 2), self.vocabulary)

    def propose(self, tree: Tree, nodes: Sequence[int], text: Sequence[int]) -> Tree:
        """The tree with candidates noted at each of `nodes`, after one forward over them.

        text: the committed tokens, for those that the draft has not seen yet.
        """
        backlog = text[self.model.cache.length : tree.position] if 0 in nodes else ()
        logits = self.model.score(tree, nodes, backlog)
        positions = logits.new_tensor([tree.position + tree.nodes[i].depth + 1 for i in nodes], dtype=torch.int64)
        sample = draft_sample(logits[:, : self.vocabulary], positions, self.candidates, **self.sampling.op_arguments)
        rows = zip(nodes, sample.tokens.tolist(), sample.scores.tolist(), sample.confidence.tolist(), strict=True)
        for node, tokens, scores, confidence in rows:
            count = sum(token >= 0 for token in tokens)
            if count == 0:  # on a device, where a kernel cannot raise
                raise ValueError("draft_logits: a row has NaN or +inf, or masks every token")
            chance = confidence if self.sampling.temperature == 0 else agreement(scores[:count])
            tree = tree.propose(node, Proposals(tuple(tokens[:count]), tuple(chance[:count])))
        return tree


def agreement(scores: Sequence[float]) -> list[float]:
    """Estimated chance that the target, under the same noise, picks each candidate: a softmax of perturbed scores.

    The noise is known, so a candidate far ahead of the next is likely the target's too, however flat the draft's
    distribution is. At temperature 0 the same formula is the draft's probability.
    """
    weights = [math.exp(score - scores[0]) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
