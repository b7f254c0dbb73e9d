"""What a request does to the logits, other than temperature and filters: as options of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


@dataclass(frozen=True)
class Adjustments:
    """bias: added to the logits of these tokens. presence, frequency: taken from the logit of each token of the answer
    so far, once, and for every time that it is there. repetition: transformers' repetition_penalty; None: the
    checkpoint's."""

    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float | None = None

    def options(self, prompt: int) -> dict[str, Any]:
        """For a prompt of so many tokens, as `SpecBranch.stream` takes them."""
        options: dict[str, Any] = {}
        if self.repetition is not None:
            options["generation_config"] = GenerationConfig(repetition_penalty=self.repetition)
        if self.bias or self.presence or self.frequency:
            options["logits_processor"] = Added(self, prompt)
        return options


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
