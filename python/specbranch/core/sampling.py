"""How the target turns logits into a token: the parameters that, with the prompt, determine the text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from specbranch.core.errors import SpecBranchError


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; filters apply in the order temperature, top-k, top-p, min-p.

    temperature 0 is greedy decoding. top_k 0, top_p 1 and min_p 0 switch a filter off. The seed selects the noise
    that the target samples with: one seed gives one text, whatever the drafting method.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SpecBranchError(f"temperature is {self.temperature}; expected a finite number >= 0")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise SpecBranchError(f"top_k is {self.top_k}; expected an integer >= 0 (0: off)")
        if not 0 < self.top_p <= 1:
            raise SpecBranchError(f"top_p is {self.top_p}; expected 0 < top_p <= 1 (1: off)")
        if not 0 <= self.min_p <= 1:
            raise SpecBranchError(f"min_p is {self.min_p}; expected 0 <= min_p <= 1 (0: off)")
        if not 0 <= self.seed < 2**63:
            raise SpecBranchError(f"seed is {self.seed}; expected 0 <= seed < 2**63")

    @property
    def filters(self) -> tuple[float, int, float, float]:
        """All but the seed: temperature, top_k, top_p, min_p."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    @property
    def op_arguments(self) -> dict[str, Any]:
        """The keyword arguments that `specbranch_ext.verify` and `draft_sample` share."""
        return {
            "seed": self.seed,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
        }
