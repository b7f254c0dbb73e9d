"""A constraint that needs no tokenizer: the made-up language's grammar over a tiny model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from language import Grammar, advance, state_of
from torch import Tensor

from specbranch.stages import Matcher
from specbranch.text.grammar import Constraint


class MadeUp(Constraint):
    """Texts of a made-up grammar. made: the matchers so far."""

    def __init__(self, seed: int, prompt: Sequence[int]) -> None:
        self.seed, self.prompt = seed, prompt
        self.made: list[Grammar] = []

    def matcher(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> Matcher:
        self.made.append(Grammar(self.seed, vocabulary, self.prompt))
        return self.made[-1]

    def processor(self, vocabulary: int) -> MadeUpProcessor:
        return MadeUpProcessor(Grammar(self.seed, vocabulary, self.prompt))

    def holds(self, tokens: Sequence[int], vocabulary: int) -> bool:
        grammar, state = Grammar(self.seed, vocabulary, self.prompt), state_of(self.prompt)
        for token in tokens:
            if token not in grammar.after(state):
                return False
            state = advance(state, token)
        return True


class MadeUpProcessor:
    """The same as a logits processor of transformers: another way to the same text."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        allowed = sorted(self.grammar.after(state_of(ids[0].tolist())))
        masked = torch.full_like(scores, -torch.inf)
        masked[:, allowed] = scores[:, allowed]
        return masked
