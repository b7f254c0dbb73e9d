"""What a benchmark asks for under a constraint, and transformers' own generation under one: a logits processor over
the same matcher."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor

from specbranch.request import Request
from specbranch.runtime.rules import bits_of
from specbranch.text.grammar import Constraint

if TYPE_CHECKING:
    from specbranch import SpecBranch


class Asked(NamedTuple):
    """A prompt's tokens, and what its answer has to follow."""

    ids: list[int]
    constraint: Constraint | None = None

    def request(self, engine: SpecBranch) -> Request | None:
        """Where there is a constraint."""
        if self.constraint is None:
            return None
        return engine.request(self.ids, max_new_tokens=1, constraint=self.constraint)

    def allowed(self, engine: SpecBranch, answer: list[int]) -> torch.Tensor | None:
        """Which tokens may follow an answer, as the ops take it: int32 [1, words]."""
        request = self.request(engine)
        under = None if request is None else request.constrained(engine.pair.vocabulary)
        if under is None:
            return None
        mask = under.allowed(answer)
        return torch.from_numpy(np.frombuffer(mask, np.int32).copy())[None]


class Masked(LogitsProcessor):
    """Of what may not follow, the logits are -inf. It is asked at texts that are guesses, too, in any order; behind a
    token that may not stand, which the model never takes, everything may follow."""

    def __init__(self, request: Request, vocabulary: int) -> None:
        """request: under a constraint. vocabulary: the target's."""
        constraint = request.constrained(vocabulary)
        assert constraint is not None
        self._prompt, self._constraint = len(request.ids), constraint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: int64 [1, n]; scores: [1, V]."""
        mask = self._constraint.allowed(input_ids[0, self._prompt :].tolist())
        return scores.masked_fill(~bits_of(mask, scores), -torch.inf)
