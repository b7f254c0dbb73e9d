"""What a request does to the logits, other than temperature and filters: as logits processors of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Adjustments:
    """bias: added to the logits of these tokens. presence, frequency: taken from the logit of each token of the answer
    so far, once, and for every time that it is there. repetition: as in transformers, of the prompt's tokens too."""

    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    def processors(self, prompt: int) -> list[Processor]:
        """For a prompt of so many tokens."""
        found: list[Processor] = []
        if self.repetition != 1:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition))
        if self.bias or self.presence or self.frequency:
            found.append(Added(self, prompt))
        return found


class Added:
    """What is added to logits and taken from them."""

    stateless = True  # so that the draft may guess under it

    def __init__(self, what: Adjustments, prompt: int) -> None:
        self._what, self._prompt = what, prompt
        self._tokens, self._values = torch.tensor([*what.bias], dtype=torch.int64), torch.tensor([*what.bias.values()])

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids: int64 [1, n]; scores: float32 [1, V]. A new tensor."""
        scores = scores.clone()
        if self._what.presence or self._what.frequency:
            tokens, counts = ids[0, self._prompt :].unique(return_counts=True)
            scores[0, tokens] -= self._what.presence + self._what.frequency * counts
        if self._what.bias:
            scores[0, self._tokens.to(scores.device)] += self._values.to(scores)
        return scores
