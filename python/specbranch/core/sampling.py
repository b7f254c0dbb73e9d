"""How the target turns logits into a token: the parameters that, with the prompt, determine the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specbranch.core.checks import number, whole
from specbranch.core.errors import SpecBranchError

LEAST, MOST = 1e-38, 1e38  # temperatures whose inverse is a float32


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
        """Raises SpecBranchError for a value of another kind or out of range; a whole float is taken as an integer."""
        for name, value in (
            ("temperature", number("temperature", self.temperature, least=0, most=MOST)),
            ("top_k", whole("top_k", self.top_k, least=0)),
            ("top_p", number("top_p", self.top_p, most=1)),
            ("min_p", number("min_p", self.min_p, least=0, most=1)),
            ("seed", whole("seed", self.seed, least=0, most=2**63 - 1)),
        ):
            object.__setattr__(self, name, value)
        if 0 < self.temperature < LEAST:
            raise SpecBranchError(f"temperature is {self.temperature}; expected 0, or {LEAST} to {MOST}")
        if self.top_p <= 0:
            raise SpecBranchError(f"top_p is {self.top_p}; expected 0 < top_p <= 1")

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

    @property
    def without_effect(self) -> tuple[str, ...]:
        """The filters that greedy decoding ignores."""
        neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        unused = tuple(name for name, value in neutral.items() if getattr(self, name) != value)
        return unused if self.temperature == 0 else ()
