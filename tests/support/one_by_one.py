"""Whether a forward over a tree gives the bits of decoding its tokens one by one."""

import torch
from tiny import PROMPT
from transformers import PreTrainedModel
from trees import place, tree_of

from specbranch.core.tree import Tree
from specbranch.runtime.batch import Inputs
from specbranch.runtime.model import CachedModel

SIBLINGS = 18


def rows_that_differ(model: PreTrainedModel, vocabulary: int = 32) -> int:
    """Of the root and its children, verified together, those whose logits are not the ones of decoding one by one."""
    cached = CachedModel(model, "target")
    cached.reset(64)
    tokens = [(5 * child + 1) % vocabulary for child in range(SIBLINGS)]
    tree = tree_of(*((token, 0, 1.0) for token in tokens), token=5, position=len(PROMPT))
    with cached.attached():
        cached.prefill(PROMPT)
        batch = place(cached, tree, range(1 + SIBLINGS))
        together = cached.forward(Inputs.of([batch], cached.device))
        cached.cache.rollback(len(PROMPT))
        root = cached.forward(Inputs.of([place(cached, Tree(5, len(PROMPT)), [0])], cached.device))
        cached.cache.commit([0])
        alone = [root[0]]
        for token in tokens:
            alone.append(
                cached.forward(Inputs.of([place(cached, Tree(token, len(PROMPT) + 1), [0])], cached.device))[0]
            )
            cached.cache.rollback(len(PROMPT) + 1)
    return sum(not torch.equal(a, b) for a, b in zip(together, alone, strict=True))
